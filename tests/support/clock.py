"""A clock that a test sets."""

from __future__ import annotations


class Clock:
    """Stands in for ``time.monotonic``, or for the module ``time``; ``now`` is its reading."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now
