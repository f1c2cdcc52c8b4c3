"""A circuit breaker: after several failures in a row, publishing fails at once for a while."""

from __future__ import annotations

import time

from ..errors import CircuitOpen


class CircuitBreaker:
    """Counts failures in a row.

    It is used by several threads without a lock, which a forked child could inherit locked. The
    worst results are a failure that is not counted, or a second caller that tries.

    :param threshold: failures in a row that open the circuit; 0: it never opens.
    :param reset: seconds after which one caller may try again.
    """

    def __init__(self, threshold: int, reset: float) -> None:
        self._threshold = threshold
        self._reset = reset
        #: Failures in a row.
        self.failures = 0
        self._retry_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether publishing is suspended."""
        return 0 < self._threshold <= self.failures

    def check(self) -> None:
        """Raise ``CircuitOpen`` while the circuit is open, but allow one call at each reset."""
        if not self.is_open:
            return
        now = time.monotonic()
        if now < self._retry_at:
            raise CircuitOpen(
                f"{self.failures} publishes in a row failed; not even trying for another "
                f"{self._retry_at - now:.1f} s.",
                "Check the connection to NATS; the outbox keeps events while it is down.",
            )
        self._retry_at = now + self._reset

    def success(self) -> None:
        """Close the circuit."""
        self.failures = 0

    def failure(self) -> None:
        """Count one failure."""
        self.failures += 1
        self._retry_at = time.monotonic() + self._reset
