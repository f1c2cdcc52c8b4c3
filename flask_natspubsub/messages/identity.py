"""What names things for good, whatever else has the same name.

- A subscriber is known by its app and its name: two apps may each have one of the same name.
- A stored message is known by its stream, its sequence and when it was stored: a stream that is
  made anew under its old name, or has lost its end, gives the same sequences again.
- An event is known by the app that published it and its event id: ids are chosen by whoever
  publishes, and only the app of the subject is checked by the server (its permissions).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import msgspec

from .subjects import slug

#: Longest subscriber in the inbox, in characters.
LONGEST = 191


class Handling(msgspec.Struct, frozen=True, gc=False):
    """One event for one subscriber, as the inbox knows it.

    :param event: the event id; of a message without one, its ``place_key``.
    :param subscriber: its ``subscriber_key``, with the publishing app if that is another one.
    :param old_event: the event in rows of version 0.1.
    :param old_subscriber: the subscriber in such rows, which had no app in their keys.
    :param stored_at: when its message was stored, if only that tells whether an old row is of
        this one; seconds since the epoch.
    """

    event: str
    subscriber: str
    old_event: str
    old_subscriber: str
    stored_at: float = 0.0


def subscriber_key(app_name: str, subscriber: str) -> str:
    """Return what names a subscriber among those of all apps: ``shop/send_mail``.

    It is what its consumer and the subject of its dead letters go by. Neither token has a slash,
    so no other pair gives the same text.
    """
    return f"{app_name}/{slug(subscriber)}"


def place_key(stream: str, sequence: int, stored_at: float) -> str:
    """Return what names a stored message among those of all times: ``stream:7:1764370000123``.

    :param stored_at: when the stream stored it, seconds since the epoch.
    """
    return f"{stream}:{sequence}:{int(stored_at * 1000)}"


def handling(app_name: str, subscriber: str, subject: str, event_id: str) -> Handling:
    """Return what the inbox of an app knows an event by.

    The event of another app has that one's name in its key, ``shop<billing/send_mail``: nobody
    who may publish as one app can take an id away from another.

    :param subject: ``{env}.{app}.{topic}``; of another form, it is taken for one of the app's own.
    """
    key = _handler_key(app_name, subscriber, _producer(subject) or app_name)
    return Handling(event_id, key, event_id, subscriber)


def unnamed_handling(
    app_name: str, subscriber: str, stream: str, sequence: int, stored_at: float
) -> Handling:
    """Return what the inbox knows a message without an event id by; no event has such a key."""
    place = place_key(stream, sequence, stored_at)
    key = _handler_key(app_name, subscriber, "")
    return Handling(place, key, f"{stream}:{sequence}", subscriber, stored_at)


@lru_cache(maxsize=1024)
def _handler_key(app_name: str, subscriber: str, producer: str) -> str:
    who = app_name if producer == app_name else f"{app_name}<{producer}"
    key = subscriber_key(who, subscriber)
    if len(key) <= LONGEST:
        return key
    return f"{key[:100]}#{hashlib.sha256(key.encode()).hexdigest()}"


@lru_cache(maxsize=1024)
def _producer(subject: str) -> str:
    tokens = subject.split(".", 2)
    return tokens[1] if len(tokens) == 3 else ""
