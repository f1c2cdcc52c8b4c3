"""Event ids and timestamps, as written in the envelope."""

from __future__ import annotations

import datetime as dt
import itertools
import os
import random
import re
import secrets
import time
import uuid
from functools import lru_cache

from ..errors import EncodingError

#: Namespace of derived ids. A change would give a message that is sent again another id.
_DERIVED = uuid.UUID("5b0f6c0e-2c57-4d0b-9d6c-6a1f8d5f3c11")

#: The counter of ids starts below this number of bits, so that it never overflows 48 bits.
_SEED_BITS = 47
_LOW_BITS = 24
_LOW = (1 << _LOW_BITS) - 1
_TAIL_BITS = 24
_TIMESTAMP = (
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?"
    r"(?:[Zz]|[+-][0-9]{2}(?::?[0-9]{2})?)"
)

_counter = itertools.count(secrets.randbits(_SEED_BITS))
#: Cached parts of the ids of one millisecond: the millisecond, the upper half of the counter,
#: and the prefix and suffix around the lower half.
_latest = 0, 0, "", ""


def new_event_id() -> str:
    """Return a new UUID of version 7, greater than all earlier ones of this process.

    It consists of the milliseconds, a counter of 48 bits with a random start in each process, and
    24 random bits for each millisecond (RFC 9562, section 6.2, method 1). ``uuid.uuid7`` needs
    Python 3.14. There is no lock, because publishing threads would wait for each other.
    """
    global _latest
    now, count = time.time_ns() // 1_000_000, next(_counter)
    known, high, head, tail = _latest
    if now > known or count >> _LOW_BITS != high:
        now, high = max(now, known), count >> _LOW_BITS  # ignore a clock that was set back
        moment, upper = f"{now:012x}", f"{high:06x}"
        head = f"{moment[:8]}-{moment[8:]}-7{upper[:3]}-8{upper[3:]}-"
        tail = f"{random.getrandbits(_TAIL_BITS):06x}"
        _latest = now, high, head, tail
    return f"{head}{count & _LOW:06x}{tail}"


def derived_event_id(event_id: str, topic: str) -> str:
    """Return the id of the copy of message ``event_id`` for ``topic``. It is deterministic."""
    # An id has no spaces, so no other pair has the same string.
    return str(uuid.uuid5(_DERIVED, f"{event_id} {topic}"))


def now_timestamp() -> str:
    """Return the current time in the format of ``format_timestamp``."""
    return _utc(time.time_ns() // 1_000_000)


@lru_cache(maxsize=4)
def _utc(milliseconds: int) -> str:
    return f"{_second(milliseconds // 1000)}.{milliseconds % 1000:03d}Z"


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def format_timestamp(moment: dt.datetime) -> str:
    """Return ``moment`` in UTC with milliseconds (cut, not rounded) and ``Z``.

    :raises EncodingError: not a datetime, without a time zone, or outside the years 1 to 9999.
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
    """Return the UTC datetime of an ISO 8601 string with ``Z`` or an offset.

    A fraction of one to nine digits is allowed; digits after the sixth are cut.

    :raises ValueError: the string has another format.
    """
    if not re.fullmatch(_TIMESTAMP, text):
        raise ValueError(f"not an ISO 8601 time with a time zone: {text!r:.80}")
    try:
        return dt.datetime.fromisoformat(text.upper()).astimezone(dt.UTC)
    except OverflowError:
        raise ValueError(f"out of range in UTC: {text!r:.80}") from None


def _after_fork() -> None:
    """Give a child process another counter, because its ids would be close to its parent's."""
    global _counter
    _counter = itertools.count(secrets.randbits(_SEED_BITS))


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def short_id(event_id: str) -> str:
    """Return a short form of ``event_id`` for a log line: the end of a UUID, or the whole id.

    The beginning of a version 7 UUID is the time, which many ids share.
    """
    return event_id[-8:] if len(event_id) == 36 and event_id.count("-") == 4 else event_id[:40]
