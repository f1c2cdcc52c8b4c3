"""Keys that identify subscribers, stored messages and events uniquely.

- A subscriber is identified by its app and its name, because two apps may use the same name.
- A stored message is identified by its stream, its sequence and the time it was stored, because
  a recreated or rewound stream uses the same sequences again.
- An event is identified by the app that published it and its event id, because publishers choose
  the ids, and the server checks only the app in the subject (by its permissions).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import msgspec

from .subjects import slug

#: Maximum length of a subscriber key in the inbox, in characters.
MAX_KEY_LENGTH = 191


class Handling(msgspec.Struct, frozen=True, gc=False):
    """The key of one event and one subscriber in the inbox.

    :param event: the event id, or the ``place_key`` of a message without one.
    :param subscriber: the ``subscriber_key``, with the publishing app if it is another app.
    :param old_event: the event in rows of version 0.1.
    :param old_subscriber: the subscriber in rows of version 0.1, which have no app.
    :param stored_at: when the message was stored, seconds since the epoch. Set only if it is
        needed to decide whether an old row belongs to this message.
    """

    event: str
    subscriber: str
    old_event: str
    old_subscriber: str
    stored_at: float = 0.0


def subscriber_key(app_name: str, subscriber: str) -> str:
    """Return the key of a subscriber among those of all apps, such as ``shop/send_mail``.

    The names of its consumer and of its dead letters' subject have the same parts. Neither part
    contains a slash, so no other pair has the same key.
    """
    return f"{app_name}/{slug(subscriber)}"


def place_key(stream: str, sequence: int, stored_at: float) -> str:
    """Return the key of a stored message, such as ``stream:7:1764370000123``.

    :param stored_at: when the stream stored the message, seconds since the epoch.
    """
    return f"{stream}:{sequence}:{int(stored_at * 1000)}"


def handling(app_name: str, subscriber: str, subject: str, event_id: str) -> Handling:
    """Return the key of an event in the inbox of an app.

    The key of another app's event contains that app's name, as in ``shop<billing/send_mail``, so
    that a publisher cannot use up an event id of another app.

    :param subject: ``{env}.{app}.{topic}``; a subject of another form counts as the app's own.
    """
    key = _handler_key(app_name, subscriber, _producer(subject) or app_name)
    return Handling(event_id, key, event_id, subscriber)


def unnamed_handling(
    app_name: str, subscriber: str, stream: str, sequence: int, stored_at: float
) -> Handling:
    """Return the inbox key of a message without an event id; no event has such a key."""
    place = place_key(stream, sequence, stored_at)
    key = _handler_key(app_name, subscriber, "")
    return Handling(place, key, f"{stream}:{sequence}", subscriber, stored_at)


@lru_cache(maxsize=1024)
def _handler_key(app_name: str, subscriber: str, producer: str) -> str:
    who = app_name if producer == app_name else f"{app_name}<{producer}"
    key = subscriber_key(who, subscriber)
    if len(key) <= MAX_KEY_LENGTH:
        return key
    return f"{key[:100]}#{hashlib.sha256(key.encode()).hexdigest()}"


@lru_cache(maxsize=1024)
def _producer(subject: str) -> str:
    tokens = subject.split(".", 2)
    return tokens[1] if len(tokens) == 3 else ""
