"""What one relay does for all processes, between its batches.

Only the relay that holds the lease of partition 0 does it:

* delete sent rows and inbox rows after their retention (``clean``),
* look whether a stream has lost messages, and have them sent again (``watch_streams``),
* move rows out of partitions that no relay has (``adopt``).

Each step is small and can be killed anywhere: the next one, here or in another process, goes on
from what the database says.
"""

from __future__ import annotations

import math
import time

import msgspec

from ..brokers.base import Broker
from ..config.settings import Settings
from ..inbox.inbox import Inbox
from .names import SENT
from .rewind import StreamWatch
from .store import OutboxStore
from .upkeep import CLEAN_BATCH

#: Seconds until the streams are looked at again after there was no connection.
PAUSE = 1.0


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How often housekeeping does what, in seconds.

    :param adopt: between two looks for rows of partitions that no relay has.
    :param check: between two looks at the streams.
    :param clean: between two clean-ups.
    :param clean_on: until the next clean-up where one has left old rows behind.
    """

    adopt: float = 2.0
    check: float = 10.0
    clean: float = 60.0
    clean_on: float = 0.1


class Housekeeping:
    """Keeps outbox, inbox and streams in order; for the thread of one relay.

    :param inbox: its rows are deleted after ``NATSPUBSUB_INBOX_RETENTION``.
    """

    def __init__(
        self, store: OutboxStore, inbox: Inbox, broker: Broker, settings: Settings
    ) -> None:
        #: May be replaced at any time.
        self.timing = Timing()
        #: What this process knows of the streams; the relay tells it of what was stored.
        self.streams = StreamWatch(store, broker)
        self._store = store
        self._inbox = inbox
        self._broker = broker
        self._settings = settings
        self._adopted = self._checked = -math.inf
        self._cleaned = time.monotonic()
        self._has_old_rows = False

    def begin(self) -> None:
        """Prepare for the work, which this process has just become responsible for."""
        self._adopted = -math.inf

    def next_due(self) -> float:
        """Return when there is something to do again, on the monotonic clock."""
        timing = self.timing
        return min(self._adopted + timing.adopt, self._checked + timing.check, self._clean_due())

    def adopt(self) -> bool:
        """Move rows out of partitions that no relay has; returns whether there were any."""
        now = time.monotonic()
        if now < self._adopted + self.timing.adopt:
            return False
        self._adopted = now
        moved = self._store.adopt(self._settings.outbox_partitions)
        if moved >= CLEAN_BATCH:
            self._adopted = -math.inf
        return moved > 0

    def watch_streams(self) -> bool:
        """Look whether a stream has lost messages; have them sent again if the settings say so.

        :returns: whether rows were made pending again, or may be by the next call.
        :raises NatsPubsubError: the database or the server failed.
        """
        now = time.monotonic()
        if not self._broker.is_connected:  # later, not at once: nothing else may be due
            self._checked = max(self._checked, now + PAUSE - self.timing.check)
            return False
        if self.streams.has_new or now >= self._checked + self.timing.check:
            self._checked = now
            self.streams.check()
        if not (self._settings.outbox_resend_on_rewind and self.streams.rewound):
            return False
        return self.streams.resend_some()

    def clean(self) -> None:
        """Delete rows after their retention, few at a time so that no transaction waits long.

        Sent rows stay while a stream is rewound: they may have to be sent again.

        :raises NatsPubsubError: the database failed.
        """
        if time.monotonic() < self._clean_due():
            return
        settings, counts = self._settings, [0]
        if not self.streams.rewound:
            counts.append(self._store.purge(SENT, settings.outbox_retention))
        counts.append(self._inbox.purge(settings.inbox_retention))
        self._has_old_rows = max(counts) >= CLEAN_BATCH
        self._cleaned = time.monotonic()

    def _clean_due(self) -> float:
        return self._cleaned + (self.timing.clean_on if self._has_old_rows else self.timing.clean)
