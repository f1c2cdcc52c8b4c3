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

_RANDOM_BITS = 74
_RANDOM_BYTES = 10
_POOL = 512 * _RANDOM_BYTES
_LOW_BITS = 62
_TIMESTAMP = re.compile(
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d(?::?\d\d)?)",
    re.ASCII | re.IGNORECASE,
)

_lock = threading.Lock()
_last = 0
#: Random bytes not used yet: each call of the system gives up the interpreter's lock.
_random = b""
_used = 0


def new_event_id() -> str:
    """Return a new UUID of version 7 (RFC 9562), greater than all before in this process.

    Written out because ``uuid.uuid7`` needs Python 3.14 and takes no lock: two threads in
    one millisecond could get ids out of order.
    """
    global _last, _random, _used
    milliseconds = time.time_ns() // 1_000_000
    with _lock:
        if _used == len(_random):
            _random, _used = os.urandom(_POOL), 0
        taken = _random[_used : _used + _RANDOM_BYTES]
        _used += _RANDOM_BYTES
        random = int.from_bytes(taken, "big") >> (8 * _RANDOM_BYTES - _RANDOM_BITS)
        value = milliseconds << _RANDOM_BITS | random
        if value <= _last:
            # The same millisecond, or a clock set back: a random step from the last one.
            value = _last + 1 + (random & 0xFFFFFFFF)
        _last = value
    high = f"{value >> _LOW_BITS:015x}"
    low = f"{value & (1 << _LOW_BITS) - 1 | 1 << 63:016x}"
    return f"{high[:8]}-{high[8:12]}-7{high[12:]}-{low[:4]}-{low[4:]}"


def derived_event_id(event_id: str, topic: str) -> str:
    """Return the id of the copy of message ``event_id`` for ``topic``; always the same one."""
    # An id has no spaces, so no other pair gives the same text.
    return str(uuid.uuid5(_DERIVED, f"{event_id} {topic}"))


def now_timestamp() -> str:
    """Return the time now, as ``format_timestamp`` writes it."""
    milliseconds = time.time_ns() // 1_000_000
    return f"{_utc_second(milliseconds // 1000)}.{milliseconds % 1000:03d}Z"


@lru_cache(maxsize=4)
def _utc_second(epoch: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(epoch))


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
    global _lock, _last, _random, _used
    _lock = threading.Lock()
    _last = 0
    _random, _used = b"", 0


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def short_id(event_id: str) -> str:
    """Return ``event_id`` in a form for a log line: the end of a UUID, else all of it.

    The beginning of a version 7 UUID is the time: ids of one moment would look the same.
    """
    return event_id[-8:] if len(event_id) == 36 and event_id.count("-") == 4 else event_id[:40]
