"""Messages that another version of the application subscribes to, and this one does not.

They come out of the consumer that both share, and go back into it for the other one.
"""

from __future__ import annotations

import random
import time

from ...text import get_logger
from ..agreement import Needs
from ..base import Delivery

_log = get_logger("flask_natspubsub.broker")

#: Seconds after which a message handed back is delivered again. After ``PATIENCE`` deliveries the
#: pause grows to ``LONGEST_HAND_BACK``: the server gives each pull its turn, and there may be many
#: of the version that does not want it.
HAND_BACK = 0.5
PATIENCE = 10
LONGEST_HAND_BACK = 10.0
#: Seconds from handing messages back to asking for others in their place: a pull that asks at once
#: gets the same messages again, each time.
ASK_AGAIN = 0.25
#: The limit of subjects remembered as ours, and of messages remembered as handed back.
KNOWN_LIMIT = 1000


class Strangers:
    """Tells messages of other versions from our own, for one pull."""

    def __init__(self, needs: Needs, who: str) -> None:
        #: Subjects that were found to be ours.
        self.known: set[str] = set()
        self._needs = needs
        self._who = who
        #: When which message was handed back.
        self._handed_back: dict[int, float] = {}

    def is_ours(self, subject: str) -> bool:
        """Whether this version subscribes to ``subject``."""
        if not self._needs.wants(subject):
            return False
        if len(self.known) < KNOWN_LIMIT:
            self.known.add(subject)
        return True

    def hand_back(self, delivery: Delivery, gives: Needs, looked: float) -> bool:
        """Nak a message for those who subscribe to it, or ack it if nobody does.

        What is known of the consumer may be older than the message, so it is acked only if the
        consumer was looked at between two of its deliveries.

        :param gives: what the consumer gave at the last look.
        :param looked: when that was, on the monotonic clock.
        :returns: whether to look again.
        """
        before = self._handed_back.pop(delivery.sequence, None)
        is_given = gives.wants(delivery.subject)
        if before is not None and looked > before and not is_given:
            _log.info("%s: nobody subscribes to %s now", self._who, delivery.subject)
            delivery.ack()
            return False
        if len(self._handed_back) >= KNOWN_LIMIT:
            self._handed_back.clear()
        self._handed_back[delivery.sequence] = time.monotonic()
        delay = HAND_BACK * 2 ** min(max(0, delivery.attempt - PATIENCE), 9)
        delivery.nak(min(delay, LONGEST_HAND_BACK) * random.uniform(0.7, 1.3))  # noqa: S311 - jitter
        return not is_given
