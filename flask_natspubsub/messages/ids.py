"""Event ids and timestamps, as they stand in the envelope."""

from __future__ import annotations

import datetime as dt
import os
import re
import threading
import time
import uuid
from functools import lru_cache

from ..errors import EncodingError

#: Namespace of derived ids; a change would give a message sent again another id.
_DERIVED = uuid.UUID("5b0f6c0e-2c57-4d0b-9d6c-6a1f8d5f3c11")

_COUNTER_LIMIT = 16**6
_RANDOM_DIGITS = 12
_SEED_DIGITS = 6
_POOL = 512 * (_RANDOM_DIGITS + _SEED_DIGITS)
_TIMESTAMP = re.compile(
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d(?::?\d\d)?)",
    re.ASCII | re.IGNORECASE,
)

_lock = threading.Lock()
_milliseconds = 0
_prefix = ""
_counter = 0
#: Random digits not used yet: each call of the system gives up the interpreter's lock.
_random = ""
_used = 0


def new_event_id() -> str:
    """Return a new UUID of version 7, greater than all before in this process.

    Milliseconds, a counter of 24 bits that starts somewhere in each of them, 48 random bits:
    RFC 9562, section 6.2, method 1. Written out because ``uuid.uuid7`` needs Python 3.14.
    """
    global _milliseconds, _prefix, _counter, _random, _used
    now = time.time_ns() // 1_000_000
    with _lock:
        if _used == len(_random):
            _random, _used = os.urandom(_POOL // 2).hex(), 0
        seed = _used + _RANDOM_DIGITS
        digits = _random[_used:seed]
        _used = seed + _SEED_DIGITS
        _counter += 1
        if now > _milliseconds or _counter == _COUNTER_LIMIT:
            # A clock set back is not followed: the ids would not be greater.
            _milliseconds = max(now, _milliseconds + 1)
            high = f"{_milliseconds:012x}"
            _prefix = f"{high[:8]}-{high[8:]}-7"
            _counter = int(_random[seed:_used], 16) // 2
        prefix, counter = _prefix, f"{_counter:06x}"
    return f"{prefix}{counter[:3]}-8{counter[3:]}-{digits}"


def derived_event_id(event_id: str, topic: str) -> str:
    """Return the id of the copy of message ``event_id`` for ``topic``; always the same one."""
    # An id has no spaces, so no other pair gives the same text.
    return str(uuid.uuid5(_DERIVED, f"{event_id} {topic}"))


def now_timestamp() -> str:
    """Return the time now, as ``format_timestamp`` writes it."""
    return _utc(time.time_ns() // 1_000_000)


@lru_cache(maxsize=4)
def _utc(milliseconds: int) -> str:
    second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{second}.{milliseconds % 1000:03d}Z"


def format_timestamp(moment: dt.datetime) -> str:
    """Return ``moment`` in UTC with milliseconds (cut, not rounded) and ``Z``.

    :raises EncodingError: no datetime, without a time zone, or outside the years 1 to 9999.
    """
    aware = _aware(moment)
    try:
        utc = aware.astimezone(dt.UTC)
    except OverflowError:
        raise EncodingError(
            f"{moment!r} is out of range in UTC.", "Use another time.", path="occurred_at"
        ) from None
    return utc.isoformat(timespec="milliseconds")[:23] + "Z"


def _aware(moment: object) -> dt.datetime:
    if not isinstance(moment, dt.datetime) or moment.utcoffset() is None:
        raise EncodingError(
            f"{moment!r:.80} is not a datetime with a time zone.",
            "Use one such as datetime.now(timezone.utc).",
            path="occurred_at",
        )
    return moment


def parse_timestamp(text: str) -> dt.datetime:
    """Return the UTC datetime of an ISO 8601 text with ``Z`` or an offset.

    A fraction of one to nine digits is allowed; digits after the sixth are cut.

    :raises ValueError: any other text.
    """
    if not _TIMESTAMP.fullmatch(text):
        raise ValueError(f"not an ISO 8601 time with a time zone: {text!r:.80}")
    try:
        return dt.datetime.fromisoformat(text.upper()).astimezone(dt.UTC)
    except OverflowError:
        raise ValueError(f"out of range in UTC: {text!r:.80}") from None


def _after_fork() -> None:
    """Start anew in a child process: the lock may have been held when it was born."""
    global _lock, _milliseconds, _counter, _random, _used
    _lock = threading.Lock()
    _milliseconds = _counter = 0
    _random, _used = "", 0


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def short_id(event_id: str) -> str:
    """Return ``event_id`` in a form for a log line: the end of a UUID, else all of it.

    The beginning of a version 7 UUID is the time: ids of one moment would look the same.
    """
    return event_id[-8:] if len(event_id) == 36 and event_id.count("-") == 4 else event_id[:40]
