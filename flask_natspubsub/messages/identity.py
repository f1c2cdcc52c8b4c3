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

#: Longest event id in the inbox, in characters.
LONGEST = 255


def subscriber_key(app_name: str, subscriber: str) -> str:
    """Return what names a subscriber among those of all apps: ``shop/send_mail``.

    An app name has no slash, so no other pair gives the same text.
    """
    return f"{app_name}/{subscriber}"


def place_key(stream: str, sequence: int, stored_at: float) -> str:
    """Return what names a stored message among those of all times: ``stream:7:1764370000123``.

    :param stored_at: when the stream stored it, seconds since the epoch.
    """
    return f"{stream}:{sequence}:{int(stored_at * 1000)}"


def event_key(own_app: str, subject: str, event_id: str) -> str:
    """Return what names an event in the inbox of ``own_app``: its id, if the app published it.

    The event of another app has that one's name before its id, so that nobody who may publish as
    one app can take an id away from another. An id that has a slash has its app before it, too:
    no id can look like another app's.

    :param subject: ``{env}.{app}.{topic}``; of another form, it is taken for one of the app's own.
    """
    producer = _producer(subject) or own_app
    if producer == own_app and "/" not in event_id:
        return event_id
    key = f"{producer}/{event_id}"
    return key if len(key) <= LONGEST else f"{producer[:100]}/{_digest(key)}"


def unnamed_key(stream: str, sequence: int, stored_at: float) -> str:
    """Return what names a message without an event id in the inbox; no event has such a name."""
    return f"/{place_key(stream, sequence, stored_at)}"


class Handling(msgspec.Struct, frozen=True, gc=False):
    """One event for one subscriber, as the inbox knows it.

    :param event: see ``event_key`` and ``unnamed_key``.
    :param subscriber: see ``subscriber_key``.
    :param old_event: the event in rows of version 0.1, which had no apps in their keys.
    :param old_subscriber: the subscriber in such rows.
    :param stored_at: when its message was stored, if only that tells whether an old row is of
        this one; seconds since the epoch.
    """

    event: str
    subscriber: str
    old_event: str
    old_subscriber: str
    stored_at: float = 0.0


@lru_cache(maxsize=1024)
def _producer(subject: str) -> str:
    tokens = subject.split(".", 2)
    return tokens[1] if len(tokens) == 3 else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
