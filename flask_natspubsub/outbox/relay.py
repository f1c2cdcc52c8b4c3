"""The loop that sends the outbox: lease, read, publish, mark, and again.

What is read is published pipelined and marked in one transaction; no transaction waits for the
network. Where there is more than one batch to send, the one before is marked and the next one
read while a batch is on its way. Killed between publish and mark, it sends the same rows again
with the same ids, which the stream recognises within its duplicate window, and the inbox beyond.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence

from ..brokers.base import Broker, Result, StoredAck, Ticket
from ..brokers.storing import LOOK_TIMEOUT, checked
from ..brokers.topology import wakeup_subject
from ..config.settings import Settings
from ..database.leased_loop import HeldLease, LeasedLoop
from ..errors import NatsPubsubError, PublishError
from ..messages.message import Message
from ..text import get_logger
from .housekeeping import Housekeeping
from .names import PARTITION
from .store import DueRow, Failure, OutboxStore, Published, runs

_log = get_logger("flask_natspubsub.relay")

FIRST_WAIT = 1.0
LONGEST_WAIT = 300.0
#: Seconds until a row is tried again after a fault that passes.
PAUSE = 1.0
#: Batches of a partition that are sent before it is the turn of another, and of housekeeping.
TURN = 8
#: What a relay that gives its leases back tells the others.
RELEASED = b"released"
#: Whoever holds this lease does the housekeeping.
HOUSEKEEPING = f"{PARTITION}0"


class Relay(LeasedLoop):
    """Sends the rows of the partitions that it holds the leases of.

    :param relayed: called with the number of rows after each batch that was sent and marked.
    :param housekeeping: done between the batches while this relay holds partition 0.
    """

    log = _log
    complaint = "the relay cannot send: %s"
    unforeseen = "the relay failed in an unforeseen way"

    def __init__(
        self,
        store: OutboxStore,
        broker: Broker,
        settings: Settings,
        relayed: Callable[[int], None],
        housekeeping: Housekeeping,
    ) -> None:
        partitions = range(settings.outbox_partitions)
        super().__init__(store.leases, [f"{PARTITION}{number}" for number in partitions])
        #: How many rows it has sent.
        self.sent = 0
        self.housekeeping = housekeeping
        self._store = store
        self._broker = broker
        self._settings = settings
        self._relayed = relayed
        self._timeout = min(settings.publish_timeout, store.leases.seconds / 2)
        self._next_poll = 0.0

    # --- life

    def run(self) -> None:
        """Relay until ``stop``; then give the leases back."""
        stop_listening = self._listen()
        try:
            super().run()
        finally:
            with contextlib.suppress(NatsPubsubError):
                stop_listening()

    def _listen(self) -> Callable[[], object]:
        """Begin to listen for wake-ups; where that is not possible, rows are found by polling."""
        try:
            return self._broker.listen(wakeup_subject(self._settings), self._on_wakeup).stop
        except NatsPubsubError as error:
            self.complain(str(error))
            return lambda: None

    def _on_wakeup(self, message: Message) -> None:
        if message.data == RELEASED:
            self.try_now()
        else:
            self.wake()

    def work(self, woken: bool) -> None:
        """Send what is due, then do the housekeeping that is due."""
        self._adopt()
        if woken or time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + self._settings.outbox_poll_interval
            if self.send_batches():
                self._next_poll = 0.0
        if self._watch_streams():
            self._next_poll = 0.0
        if self.holds(HOUSEKEEPING):
            self.housekeeping.clean()

    def next_due(self) -> float:
        """Return when it polls again, or has housekeeping to do, on the monotonic clock."""
        if self.holds(HOUSEKEEPING):
            return min(self._next_poll, self.housekeeping.next_due())
        return self._next_poll

    def failed(self) -> None:
        """Poll at once after the pause."""
        self._next_poll = 0.0

    def taken(self, name: str) -> None:
        """Read what the relays before have seen of the streams, then poll at once."""
        self._next_poll = 0.0
        self.housekeeping.streams.load()
        _log.info("relaying partition %d of the outbox", _partition(name))
        if name == HOUSEKEEPING:
            self.housekeeping.begin()

    def lost(self, name: str) -> None:
        """Log it: the other relay sends the partition's rows now."""
        _log.warning("the lease of partition %d was lost to another relay", _partition(name))

    def released(self) -> None:
        """Tell the relays that stand by."""
        self._broker.send(wakeup_subject(self._settings), RELEASED)

    def run_once(self) -> int:
        """Send all rows that are due, then give the leases back; returns how many were sent.

        :raises NatsPubsubError: the database, or the connection to the broker, failed.
        """
        before = self.sent
        try:
            self.take_leases()
            self._adopt()
            self._watch_streams()
            more = True
            while more and not self._stopping.is_set():
                self.take_leases()
                found = self.send_batches()
                more = self._watch_streams() or found
        finally:
            self.release()
        return self.sent - before

    def is_idle(self) -> bool:
        """Whether no row of any partition is due, whichever relay sends it.

        :raises DatabaseError: the database failed.
        """
        partitions = range(self._settings.outbox_partitions)
        return not any(self._store.due(partition, 1) for partition in partitions)

    @property
    def partitions(self) -> list[int]:
        """The partitions whose leases this relay holds."""
        return sorted(map(_partition, self._held))

    # --- one round

    def step(self) -> int:
        """Send one batch of each partition held; returns how many rows were sent.

        :raises PublishError: none could be sent, for a reason that passes.
        """
        before = self.sent
        self.take_leases()
        self.send_batches(1)
        return self.sent - before

    def send_batches(self, limit: int = TURN) -> bool:
        """Send up to ``limit`` batches of each partition held; returns whether there may be more.

        :raises PublishError: none could be sent, for a reason that passes.
        """
        found = [self._send_partition(held, limit) for held in list(self._held.values())]
        return any(found)

    def _send_partition(self, held: HeldLease, limit: int) -> bool:
        """Send up to ``limit`` batches; while one is on its way, the one before it is marked."""
        partition = _partition(held.name)
        size, published = self._settings.outbox_batch_size, None
        rows = self._store.due(partition, size)
        found = bool(rows)
        while rows:
            limit -= 1
            parts = runs(rows)
            first = self._launch(parts[0], held)
            if published is not None:
                self._mark(held, published)
            ahead: list[DueRow] = []
            if limit and len(rows) == size and not self._stopping.is_set():
                ahead = self._store.due_behind(partition, size, rows)
            published = self._land(first, parts, held)
            # What was read ahead of a failure is read again, when those behind it are as well.
            rows = [] if published.errors or not self.holds(held.name) else ahead
        if published is not None:
            self._mark(held, published)
        return found  # also if all were refused: those behind them need not wait for the next poll

    def _launch(self, rows: Sequence[DueRow], held: HeldLease) -> Ticket | None:
        """Publish rows without waiting; None if they may be another relay's by now."""
        if not self.is_ours(held, self._timeout):
            return None
        self.beat = time.monotonic()
        return self._broker.submit(rows, self._timeout)

    def _land(
        self, first: Ticket | None, parts: Sequence[Sequence[DueRow]], held: HeldLease
    ) -> Published:
        """Wait for the answers and publish the rest: of one key no row before the one ahead of it.

        :param first: the first of ``parts``, which is on its way.
        :raises PublishError: none could be sent, for a reason that passes: leave the rows.
        """
        streams = self.housekeeping.streams
        done, stuck, ticket = Published({}, {}), set[str | None](), first
        for number, part in enumerate(parts):
            rows = [row for row in part if row.ordering_key not in stuck]
            if not rows:
                continue
            if number:
                ticket = self._launch(rows, held)
            if ticket is None:
                break
            results = ticket.results_within(self._timeout)
            stuck |= done.add(rows, self._checked(rows, results, held))
            streams.note([(r.event_id, done.sent[r.id]) for r in rows if r.id in done.sent])
            if done.errors and time.monotonic() - self.beat > self._timeout / 2:
                break  # no answer came, and to wait for the others would take as long again
        errors = [error for _, error in done.errors.values()]
        if errors and not done.sent and all(error.temporary for error in errors):
            raise errors[0]
        return done

    def _checked(
        self, rows: Sequence[DueRow], results: Sequence[Result], held: HeldLease
    ) -> Sequence[Result]:
        """Check whether what the stream calls duplicates are ours; see ``brokers.storing``."""
        duplicates = [r for r in results if isinstance(r, StoredAck) and r.duplicate]
        if not duplicates or not self.is_ours(held, self._timeout + LOOK_TIMEOUT):
            return results
        return checked(rows, results, self._broker, self._timeout)

    def _mark(self, held: HeldLease, done: Published) -> None:
        failures = {row.id: self._failure(row, error) for row, error in done.errors.values()}
        started = time.monotonic()
        if not self._store.mark(held.lease, done.sent, failures):
            self.lose(held)
            return
        self.renewed(held, started)
        with contextlib.suppress(NatsPubsubError):  # it is tried again with the next check
            self.housekeeping.streams.report()
        if done.sent:
            self.sent += len(done.sent)
            self._relayed(len(done.sent))

    def _failure(self, row: DueRow, error: PublishError) -> Failure:
        refused = not error.temporary
        limit = self._settings.outbox_max_attempts
        park = refused and row.attempts + 1 >= limit
        if park:
            _log.error("outbox row %d is parked after %d attempts: %s", row.id, limit, error)
        wait = min(FIRST_WAIT * 2**row.attempts, LONGEST_WAIT) if refused else PAUSE
        return Failure(str(error), wait * random.uniform(0.8, 1.2), refused, park)  # noqa: S311

    # --- housekeeping

    def _adopt(self) -> None:
        if self.holds(HOUSEKEEPING) and self.housekeeping.adopt():
            self._next_poll = 0.0

    def _watch_streams(self) -> bool:
        """Watch the streams, if that is this relay's; returns whether there may be more to send."""
        if not self.holds(HOUSEKEEPING):
            return False
        try:
            return self.housekeeping.watch_streams()
        except NatsPubsubError as error:
            self.complain(f"the streams could not be looked at: {error}")
            return False


def _partition(lease: str) -> int:
    return int(lease.removeprefix(PARTITION))
