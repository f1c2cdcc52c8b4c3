"""The headers of a replay: the addressee, the dead letter, the number of replays."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..brokers.storing import MESSAGE_ID, REPLAY_OF
from ..messages.headers import Headers, pairs_of
from ..messages.subjects import slug
from ..subscribing.subscription import Subscription
from ..text import printable

REPLAY_FOR = "x-replay-for"
REPLAY_APP = "x-replay-app"
REPLAY_COUNT = "x-replay-count"
REPLAY_FORCE = "x-replay-force"
_OF_REPLAYS = frozenset({REPLAY_FOR, REPLAY_APP, REPLAY_COUNT, REPLAY_FORCE, REPLAY_OF})
_OF_DEAD_LETTERS = re.compile(
    r"x-(dead-letter|dlq-|deliveries|event-id|trace-id|original-|subscriber)", re.I
)
_HEADER_NAME = re.compile(r"[!-9;-~]+")


def kept(headers: Mapping[str, str]) -> Headers:
    """Return the original headers, without those of dead letters and the server's own."""
    return Headers(
        (name, printable(value))
        for name, value in pairs_of(headers)
        if _HEADER_NAME.fullmatch(name)
        and not name.lower().startswith("nats-")
        and not _OF_DEAD_LETTERS.match(name)
    )


def replay_headers(
    original: Mapping[str, str],
    *,
    message_id: str,
    letter: str,
    addressee: tuple[str, str] | None,
    force: bool,
) -> dict[str, str]:
    """Return the headers of a replay.

    :param original: the headers of the message.
    :param letter: the place of the dead letter, for ``x-replay-of``.
    :param addressee: the app and the subscriber that it is for; None: all that receive it.
    """
    count = number(original.get(REPLAY_COUNT)) + 1
    headers = kept(original)
    for name in [name for name in headers if name.lower() in _OF_REPLAYS]:
        del headers[name]
    headers |= {MESSAGE_ID: printable(message_id), REPLAY_COUNT: str(count), REPLAY_OF: letter}
    if addressee is not None:
        headers[REPLAY_APP], headers[REPLAY_FOR] = map(printable, addressee)
    if force:
        headers[REPLAY_FORCE] = "true"
    return headers


def is_for(headers: Mapping[str, str], subscription: Subscription) -> bool:
    """Whether a message is for this subscriber: all are, except replays for another one."""
    name = headers.get(REPLAY_FOR)
    if name is None:
        return True
    is_name = name == subscription.name or slug(name) == subscription.token
    return is_name and headers.get(REPLAY_APP) in (None, subscription.app)


def forced_id(headers: Mapping[str, str], event_id: str) -> str:
    """Return the id that the inbox uses for a message: a forced replay has one of its own.

    It starts with the event id, so that nobody can mark another event as handled.
    """
    if headers.get(REPLAY_FORCE) is None:  # "in" would parse all of them
        return event_id
    return f"{event_id}:replay:{headers.get(REPLAY_OF) or headers.get(MESSAGE_ID, '')}"


def number(value: object) -> int:
    """Return the whole number in ``value``, an int or a string; 0 if there is none."""
    text = str(value)
    return int(text) if text.isdecimal() and len(text) < 10 else 0
