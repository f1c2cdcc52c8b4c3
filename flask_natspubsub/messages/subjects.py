"""Topics and subjects: converts an application's names to NATS addresses.

A topic is the application's name for a kind of event (``order.created``); its subject is
``{env}.{app_name}.{topic}``. Matching is by token: ``*`` matches exactly one token, and ``>``,
only at the end, matches one or more.
"""

from __future__ import annotations

import re
from functools import lru_cache

from ..errors import InvalidTopic

#: App names that would collide with subjects that the streams use themselves.
RESERVED_APP_NAMES = frozenset({"dlq", "events"})
#: The first token of topics for dead letters, which the peers' packages use.
RESERVED_TOPIC = "dlq"

#: Maximum length of a subject, in characters.
MAX_SUBJECT_LENGTH = 255

# Not compiled at import, to keep the import fast; a process uses few of them.
_PART = r"[A-Za-z0-9_-]+"
_NOT_IN_NAME = r"[^A-Za-z0-9_-]+"
_NOT_IN_TOPIC = r"[^a-z0-9_.-]"
_NOT_IN_PATTERN = r"[^a-z0-9_.*>-]"


def slug(name: str) -> str:
    """Convert any name to one valid token, for example ``my.shop app`` to ``my_shop_app``.

    A name without a usable character becomes ``app``, so that the token is never empty.
    """
    return re.sub(_NOT_IN_NAME, "_", name).strip("_") or "app"


def normalize_topic(topic: str, *, wildcards: bool = False) -> str:
    """Return ``topic`` as part of a subject: lower case, other characters replaced by ``_``.

    Topics are ASCII, because every letter of another script would become ``_``, so that all words
    of one length would be the same.

    :param wildcards: allow ``*`` and a last ``>`` as whole tokens, as subscriptions do.
    :raises InvalidTopic: not a string, not ASCII, blank, an empty token, a misplaced wildcard,
        or, without ``wildcards``, a topic for dead letters.
    """
    _check_text(topic)
    if not topic.strip():
        raise InvalidTopic("The topic is blank.", "Use a name such as 'order.created'.")
    if not topic.isascii():
        raise _not_ascii("topic", topic)
    if not wildcards and ("*" in topic or ">" in topic):
        raise _invalid("topic", topic, "has a wildcard; only subscriptions may have one")
    unwanted = _NOT_IN_PATTERN if wildcards else _NOT_IN_TOPIC
    normal = re.sub(unwanted, "_", topic.lower())
    _check_tokens("topic", normal)
    if not wildcards and normal.split(".", 1)[0] == RESERVED_TOPIC:
        raise InvalidTopic(
            f"The topic {_short(topic)} is for dead letters.", "Begin it with another word."
        )
    return normal


def subject_for(env: str, app_name: str, topic: str) -> str:
    """Return the subject that a message about ``topic`` is published to.

    :raises InvalidTopic: see ``normalize_topic``; also if the subject is too long.
    """
    if type(topic) is not str:
        _check_text(topic)
    return _subject(env, app_name, topic, False)


def filter_for(env: str, producer: str, topic: str) -> str:
    """Return the subject filter for messages of ``producer`` about ``topic``.

    :param producer: an app name, or ``*`` for every app.
    :param topic: may have wildcards.
    :raises InvalidTopic: the topic or producer is invalid, or the subject is too long.
    """
    if producer != "*":
        _check_one_token("producer", producer)
    _check_text(topic)
    return _subject(env, producer, topic, True)


def dead_letter_subject(env: str, app_name: str, subscriber: str) -> str:
    """Return the subject of the dead letters of ``subscriber``.

    :raises InvalidTopic: the subscriber's name is not one token.
    """
    _check_one_token("subscriber", subscriber)
    return _checked_length(f"{env}.dlq.{app_name}.{subscriber}")


def topic_of(subject: str) -> str:
    """Return ``subject`` without its first two tokens, or unchanged if it has no more."""
    tokens = subject.split(".", 2)
    return tokens[2] if len(tokens) == 3 else subject


def check_filter(subject: str) -> str:
    """Check a raw NATS subject to subscribe to, and return it.

    :raises InvalidTopic: it has blanks, control characters, empty tokens or misplaced wildcards.
    """
    _check_text(subject, "subject")
    if not subject.isprintable() or " " in subject:
        raise _invalid("subject", subject, "has a space or control character")
    _check_tokens("subject", subject)
    return _checked_length(subject)


@lru_cache(maxsize=4096)
def is_subject(subject: str) -> bool:
    """Whether a message can be sent to ``subject``: printable tokens without wildcards.

    This is stricter than the server, which accepts control characters and wildcards.
    """
    if not subject.isprintable() or " " in subject:
        return False
    return all(token and token not in ("*", ">") for token in subject.split("."))


def matches(pattern: str, subject: str) -> bool:
    """Whether ``pattern`` matches the concrete ``subject``."""
    return covers(pattern, subject)


def covers(pattern: str, other: str) -> bool:
    """Whether ``pattern`` matches every subject that ``other`` matches."""
    theirs = other.split(".")
    ours = pattern.split(".")
    for position, part in enumerate(ours):
        if part == ">":
            return len(theirs) > position
        if position == len(theirs) or theirs[position] == ">":
            return False
        if part not in ("*", theirs[position]):
            return False
    return len(ours) == len(theirs)


def overlaps(a: str, b: str) -> bool:
    """Whether some subject is matched by both ``a`` and ``b``."""
    ours, theirs = a.split("."), b.split(".")
    for one, other in zip(ours, theirs, strict=False):
        if ">" in (one, other):
            return True
        if one != other and "*" not in (one, other):
            return False
    return len(ours) == len(theirs)


@lru_cache(maxsize=1024)
def _subject(env: str, app_name: str, topic: str, wildcards: bool, /) -> str:
    return _checked_length(f"{env}.{app_name}.{normalize_topic(topic, wildcards=wildcards)}")


def _checked_length(subject: str) -> str:
    if len(subject) > MAX_SUBJECT_LENGTH:
        raise _invalid(
            "subject", subject, f"has {len(subject)} characters; {MAX_SUBJECT_LENGTH} are allowed"
        )
    return subject


def _check_text(name: object, what: str = "topic") -> None:
    # Checked before the cache, because another type may not be hashable.
    if not isinstance(name, str):
        raise InvalidTopic(
            f"A {what} is text, not {type(name).__name__}.", "Use a name such as 'order.created'."
        )


def _check_one_token(what: str, name: object) -> None:
    if not isinstance(name, str) or not re.fullmatch(_PART, name):
        raise InvalidTopic(
            f"The {what} {name!r:.80} cannot be part of a subject.",
            "Use letters, digits, '_' and '-'.",
        )


def _check_tokens(what: str, name: str) -> None:
    """Refuse empty tokens, and wildcards that are only part of a token."""
    tokens = name.split(".")
    if not all(tokens):
        raise _invalid(what, name, "has an empty token")
    for position, part in enumerate(tokens):
        if part == ">" and position != len(tokens) - 1:
            raise _invalid(what, name, "has a '>' that is not at its end")
        if len(part) > 1 and ("*" in part or ">" in part):
            raise _invalid(what, name, "has a wildcard inside a token")


def _invalid(what: str, name: str, problem: str) -> InvalidTopic:
    return InvalidTopic(
        f"The {what} {_short(name)} {problem}.",
        "Use tokens of letters, digits, '_' and '-' joined by dots, such as 'order.created'.",
    )


def _not_ascii(what: str, name: str) -> InvalidTopic:
    odd = next(char for char in name if not char.isascii())
    return InvalidTopic(
        f"The {what} {_short(name)} has {odd!r}: in a subject it would be '_', as any other such "
        f"letter, so different {what}s would be one.",
        "Use ASCII letters, digits, '_' and '-' joined by dots, such as 'order.created'.",
    )


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")
