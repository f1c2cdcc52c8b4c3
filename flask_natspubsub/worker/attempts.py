"""Deliveries that were cut short, and which of all count against their message."""

from __future__ import annotations

from ..brokers.base import Delivery

#: Messages that are remembered; of older ones, every delivery counts.
MOST = 10_000
#: So often a database may be lost after the handler has begun before that counts. The database
#: may be restarting; but the handler may also be what its connection is lost of.
LOSSES = 3
#: Wait after the inbox was busy, doubled each time, and the longest; seconds.
PAUSE, LONGEST_PAUSE = 0.5, 10.0


class Attempts:
    """What one worker process knows of the deliveries of one subscriber; any thread.

    The server counts every delivery. Here stands how many of them do not count, by sequence.
    Another process does not know: it may give up sooner, and never later than this one.
    """

    def __init__(self, max_deliver: int) -> None:
        self._max_deliver = max_deliver
        self._spared: dict[int, int] = {}
        self._losses: dict[int, int] = {}
        #: Whether anything is known of any message.
        self.is_any = False

    def of(self, delivery: Delivery) -> int:
        """Return which attempt this is, of those that count; 1 is the first."""
        return max(1, delivery.attempt - self._spared.get(delivery.sequence, 0))

    def pause(self, delivery: Delivery) -> float:
        """Return how long to wait at least before a thread waits for the message again; seconds.

        So that those whose inbox rows are locked do not keep the threads from all others.
        """
        spared = self._spared.get(delivery.sequence, 0)
        return float(min(PAUSE * 2 ** min(spared, 10), LONGEST_PAUSE))

    def spare(self, delivery: Delivery) -> None:
        """Do not count this delivery, and let the next one be a last attempt at least."""
        before = self._spared.pop(delivery.sequence, 0)
        if len(self._spared) >= MOST:
            self._spared.pop(next(iter(self._spared)), None)
        enough = delivery.attempt + 1 - self._max_deliver
        self._spared[delivery.sequence] = max(before + 1, enough)
        self.is_any = True

    def spare_a_loss(self, delivery: Delivery) -> bool:
        """Do not count a delivery that may have failed of itself; False if it was so too often."""
        losses = self._losses.pop(delivery.sequence, 0) + 1
        if len(self._losses) >= MOST:
            self._losses.pop(next(iter(self._losses)), None)
        self._losses[delivery.sequence] = losses
        self.is_any = True
        if losses > LOSSES:
            return False
        self.spare(delivery)
        return True

    def forget(self, delivery: Delivery) -> None:
        """Remember nothing of a message that has come to its end."""
        self._spared.pop(delivery.sequence, None)
        self._losses.pop(delivery.sequence, None)
        self.is_any = bool(self._spared or self._losses)
