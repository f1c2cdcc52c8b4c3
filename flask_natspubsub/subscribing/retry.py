"""The decision on a message whose handler raised: retry, drop or give up. No clock, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import random as stdlib_random
from typing import Literal

import msgspec

from ..config.parsers import seconds
from ..errors import DatabaseError, DeadLetter, DecodingError, Discard, Retry
from ..text import printable

#: The reason for giving up on a message; ``x-dlq-reason`` of its dead letter.
GiveUpReason = Literal["malformed", "schema", "handler_error", "max_deliver_exceeded", "rejected"]

#: Largest deviation of a delay, as a fraction of it.
JITTER = 0.2

#: Limit of what ``error_text`` returns, in bytes.
ERROR_TEXT_LIMIT = 1024


class RetryLater(msgspec.Struct, frozen=True):
    """Deliver the message again after ``delay`` seconds."""

    delay: float


class Drop(msgspec.Struct, frozen=True):
    """The handler discarded the message: acknowledge it and keep nothing."""

    reason: str


class GiveUp(msgspec.Struct, frozen=True):
    """Store the message as a dead letter, with ``reason`` and ``error``."""

    reason: GiveUpReason
    error: BaseException


Verdict = RetryLater | Drop | GiveUp


def backoff_delay(
    attempt: int, delays: Sequence[float], random: Callable[[], float] = stdlib_random
) -> float:
    """Return the seconds to wait after the failed delivery number ``attempt`` (1 is the first).

    The last of ``delays`` repeats. Jitter of 20 % up or down keeps messages that failed
    together from coming back together; a delay of 0 stays 0.

    :param random: returns a number from 0 to 1.
    """
    delay = delays[min(max(attempt, 1), len(delays)) - 1]
    return delay * (1 - JITTER + 2 * JITTER * random())


def classify(
    error: BaseException,
    *,
    attempt: int,
    max_deliver: int,
    backoff: Sequence[float],
    random: Callable[[], float] = stdlib_random,
    spared: bool | None = None,
) -> Verdict:
    """Decide on a message whose delivery number ``attempt`` ended in ``error``.

    A ``Retry`` is an ordinary failure with a delay of its own: it counts, and ends in a
    dead letter at ``max_deliver`` too, or a handler could keep a message for ever. A database
    that does not answer is not the message's fault: the message is retried until it does.

    :param spared: whether the failure does not count; default: if it is the database's.
    """
    if isinstance(error, Discard):
        return Drop(str(error))
    if isinstance(error, DeadLetter):
        return GiveUp("rejected", error)
    if isinstance(error, DecodingError):
        return GiveUp(error.reason, error)
    if spared is None:
        spared = isinstance(error, DatabaseError)
    if attempt >= max_deliver and not spared:
        return GiveUp("handler_error", error)
    asked = _asked_delay(error)
    return RetryLater(backoff_delay(attempt, backoff, random) if asked is None else asked)


def _asked_delay(error: BaseException) -> float | None:
    if not isinstance(error, Retry) or error.delay is None:
        return None
    try:
        return seconds(error.delay)
    except ValueError:  # not a duration: a mistake in the handler must not stop the worker
        return None


def error_text(error: BaseException) -> str:
    """Return class and message of ``error`` in one line of printable characters, 1 KiB at most."""
    message = printable(error)
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return text.encode()[:ERROR_TEXT_LIMIT].decode(errors="ignore")
