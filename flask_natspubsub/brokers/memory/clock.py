"""The clocks a broker in memory can run on."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time."""

    def now(self) -> float:
        """Seconds since the epoch; never goes back."""


class SystemClock:
    """The computer's time, as it passes.

    Read from the wall once and advanced by the monotonic clock, so that setting the
    computer's clock neither hurries nor holds up a redelivery.
    """

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._offset + time.monotonic()


class VirtualClock:
    """A clock that moves only when told to, for tests that must not wait.

    :param start: the first reading, seconds since the epoch; default: the present.
    """

    def __init__(self, start: float | None = None) -> None:
        self._now = time.time() if start is None else start

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward.

        :raises ValueError: ``seconds`` is negative.
        """
        if seconds < 0:
            raise ValueError(f"A clock cannot go back; advance({seconds!r}).")
        self._now += seconds
