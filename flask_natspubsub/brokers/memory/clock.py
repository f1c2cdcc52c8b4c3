"""Clocks of the broker in memory."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """The interface of a clock."""

    def now(self) -> float:
        """Return the seconds since the epoch; never goes back."""


class SystemClock:
    """The computer's time.

    The wall clock is read once and advanced by the monotonic clock, so that changing the
    computer's clock does not affect redeliveries.
    """

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """Return the seconds since the epoch."""
        return self._offset + time.monotonic()


class VirtualClock:
    """A clock that moves only by ``advance``, for tests that must not wait.

    :param start: the initial time, seconds since the epoch; default: the current time.
    """

    def __init__(self, start: float | None = None) -> None:
        self._now = time.time() if start is None else start

    def now(self) -> float:
        """Return the seconds since the epoch."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the clock forward by ``seconds``.

        :raises ValueError: ``seconds`` is negative.
        """
        if seconds < 0:
            raise ValueError(f"A clock cannot go back; advance({seconds!r}).")
        self._now += seconds
