"""The loop that sends the outbox: lease, read, publish, mark, and again.

What is read is published pipelined and marked in one transaction; no transaction waits for the
network. Where there is more than one batch to send, the one before is marked and the next one
read while a batch is on its way. Killed between publish and mark, it sends the same rows again
with the same ids, which the stream, within its duplicate window, and the inbox beyond it, know.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..brokers.base import Broker, Result, StoredAck, Ticket
from ..brokers.storing import LOOK_TIMEOUT, checked
from ..brokers.topology import wakeup_subject
from ..config.settings import Settings
from ..errors import NatsPubsubError, PublishError
from ..messages.message import Message
from ..text import get_logger
from .names import PARTITION, SENT
from .rewind import StreamWatch
from .store import DueRow, Failure, OutboxStore, Published, runs
from .upkeep import CLEAN_BATCH, LEASE_SECONDS

if TYPE_CHECKING:
    from ..database.leases import Lease

_log = get_logger("flask_natspubsub.relay")

FIRST_WAIT = 1.0
LONGEST_WAIT = 300.0
PAUSE = 1.0
#: So many seconds before a lease ends it is renewed: longer than one publish may take.
RENEW_BEFORE = LEASE_SECONDS * 2 / 3
STAND_BY_INTERVAL = 2.0
LOG_INTERVAL = 10.0
CLEAN_INTERVAL = 60.0
#: How often it is looked whether the streams still have what they acknowledged.
CHECK_INTERVAL = 10.0
CLEAN_PAUSE = 0.1
#: So many batches of a partition are sent before it is the turn of another, and of other duties.
TURN = 8
#: What a relay that gives its leases back says to the others.
RELEASED = b"released"


@dataclass(slots=True)
class _Held:
    """The lease of a partition, and until when it is surely ours on this process's own clock."""

    partition: int
    lease: Lease
    until: float


class Relay:
    """Sends the rows of the partitions that it holds the leases of.

    :param relayed: told how many rows were sent.
    :param clean: called now and then, by one relay only, to delete what is old elsewhere;
        returns how many, ``CLEAN_BATCH`` if there may be more.
    """

    def __init__(
        self,
        store: OutboxStore,
        broker: Broker,
        settings: Settings,
        relayed: Callable[[int], None],
        clean: Callable[[], int] = lambda: 0,
    ) -> None:
        #: How often another relay had taken a lease before this one renewed it.
        self.lease_lost = 0
        #: How many rows it has sent.
        self.sent = 0
        #: When ``run`` was last seen to go round, on the monotonic clock.
        self.beat = time.monotonic()
        self._store = store
        self._broker = broker
        self._settings = settings
        self._relayed = relayed
        self._also_clean = clean
        self._timeout = min(settings.publish_timeout, LEASE_SECONDS / 2)
        self._watch = StreamWatch(store, broker)
        self._next_check = 0.0
        host = socket.gethostname()[:32]
        self._owner = f"{host}:{os.getpid()}:{secrets.token_hex(4)}"
        self._held: dict[int, _Held] = {}
        self._next_poll = 0.0
        self._next_try = 0.0
        self._next_adoption = 0.0
        self._next_clean = time.monotonic() + CLEAN_INTERVAL
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._logged = 0.0

    # --- life

    def run(self) -> None:
        """Relay until ``stop``; then give the leases back."""
        stop_listening = self._listen()
        try:
            while not self._stopping.is_set():
                self._wake.wait(self._round())
        finally:
            self.beat = -math.inf
            self.release()
            with contextlib.suppress(NatsPubsubError):
                stop_listening()

    def _listen(self) -> Callable[[], object]:
        """Begin to listen for hints; where that cannot be, rows are found by polling."""
        try:
            return self._broker.listen(wakeup_subject(self._settings), self._on_hint).stop
        except NatsPubsubError as error:
            self._complain(str(error))
            return lambda: None

    def _round(self) -> float:
        """Do what is due; returns for how many seconds nothing else will be."""
        self.beat = time.monotonic()
        woken = self._wake.is_set()
        self._wake.clear()
        try:
            self._take_leases()
            self._adopt()
            if woken or time.monotonic() >= self._next_poll:
                self._next_poll = time.monotonic() + self._settings.outbox_poll_interval
                if self._send_batches():
                    self._next_poll = 0.0
            self._watch_streams()
            self._clean()
        except NatsPubsubError as error:
            self._complain(str(error))
        except Exception:  # noqa: BLE001 - whatever it is, the outbox must not stand still
            _log.exception("the relay failed in an unforeseen way")
        else:
            return max(0.0, self._next_event() - time.monotonic())
        self._next_poll = 0.0
        self._stopping.wait(PAUSE * random.uniform(0.75, 1.25))  # noqa: S311 - jitter
        return 0.0

    def _next_event(self) -> float:
        times = [self._next_poll, *(held.until - RENEW_BEFORE for held in self._held.values())]
        if len(self._held) < self._settings.outbox_partitions:
            times.append(self._next_try)
        if 0 in self._held:
            times += (self._next_clean, self._next_check, self._next_adoption)
        return min(times)

    def stop(self) -> None:
        """Have ``run`` return after the batch in hand."""
        self._stopping.set()
        self._wake.set()

    def release(self) -> None:
        """Give the leases back, and tell the stand-bys."""
        held, self._held = list(self._held.values()), {}
        self._next_try = 0.0
        for one in held:
            with contextlib.suppress(NatsPubsubError):
                self._store.leases.release(one.lease)
        if held:
            self._broker.send(wakeup_subject(self._settings), RELEASED)

    def run_once(self) -> int:
        """Send all that is due, then give the leases back; returns how many were sent.

        :raises NatsPubsubError: the database, or the connection to the broker, failed.
        """
        before = self.sent
        try:
            self._take_leases()
            self._adopt()
            self._watch_streams()
            more = True
            while more and not self._stopping.is_set():
                self._take_leases()
                found = self._send_batches()
                more = self._watch_streams() or found
        finally:
            self.release()
        return self.sent - before

    def is_idle(self) -> bool:
        """Whether no row of any partition is due, whoever relays it."""
        partitions = range(self._settings.outbox_partitions)
        return not any(self._store.due(partition, 1) for partition in partitions)

    @property
    def is_alive(self) -> bool:
        """Whether ``run`` goes round; each round is bounded by the timeouts of its calls."""
        return time.monotonic() - self.beat < 6 * LEASE_SECONDS

    @property
    def partitions(self) -> list[int]:
        """The partitions whose leases this relay holds."""
        return sorted(self._held)

    def _on_hint(self, message: Message) -> None:
        if message.data == RELEASED:
            self._next_try = 0.0
            self._wake.set()
        else:
            self.nudge()

    def nudge(self) -> None:
        """Have it look for rows now; any thread."""
        if self._held:
            self._wake.set()

    # --- one round

    def step(self) -> int:
        """Send one batch of each partition held; returns how many rows were sent.

        :raises PublishError: none could be sent, for a reason that passes.
        """
        before = self.sent
        self._take_leases()
        self._send_batches(1)
        return self.sent - before

    def _send_batches(self, most: int = TURN) -> bool:
        """Send up to so many batches of each partition; returns whether there may be more."""
        found = [self._send_partition(held, most) for held in list(self._held.values())]
        return any(found)

    def _take_leases(self) -> None:
        for held in list(self._held.values()):
            if held.until - time.monotonic() <= RENEW_BEFORE:
                self._renew(held)
        now = time.monotonic()
        if len(self._held) == self._settings.outbox_partitions or now < self._next_try:
            return
        self._next_try = now + STAND_BY_INTERVAL
        for partition in range(self._settings.outbox_partitions):
            if partition not in self._held:
                self._take_lease(partition)

    def _take_lease(self, partition: int) -> None:
        started = time.monotonic()
        lease = self._store.leases.acquire(f"{PARTITION}{partition}", self._owner)
        if lease is None:
            return
        self._held[partition] = _Held(partition, lease, started + LEASE_SECONDS)
        self._next_poll = 0.0
        self._watch.load()
        _log.info("relaying partition %d of the outbox", partition)
        if partition == 0:
            self._next_adoption = 0.0

    def _renew(self, held: _Held) -> bool:
        started = time.monotonic()
        if not self._store.leases.renew(held.lease):
            self._lose(held)
            return False
        held.until = started + LEASE_SECONDS
        return True

    def _lose(self, held: _Held) -> None:
        if self._held.pop(held.partition, None) is not None:
            self.lease_lost += 1
            _log.warning("the lease of partition %d was lost to another relay", held.partition)

    def _send_partition(self, held: _Held, most: int) -> bool:
        """Send up to ``most`` batches; while one is on its way, the one before it is marked."""
        size, published = self._settings.outbox_batch_size, None
        rows = self._store.due(held.partition, size)
        found = bool(rows)
        while rows:
            most -= 1
            parts = runs(rows)
            first = self._launch(parts[0], held)
            if published is not None:
                self._mark(held, published)
            ahead: list[DueRow] = []
            if most and len(rows) == size and not self._stopping.is_set():
                ahead = self._store.due_behind(held.partition, size, rows)
            published = self._land(first, parts, held)
            # What was read ahead of a failure is read again, when those behind it are as well.
            rows = [] if published.errors or held.partition not in self._held else ahead
        if published is not None:
            self._mark(held, published)
        return found  # also if all were refused: those behind them need not wait for the next poll

    def _launch(self, rows: Sequence[DueRow], held: _Held) -> Ticket | None:
        """Publish rows without waiting; None if they may be another relay's by now."""
        if not self._is_ours(held, self._timeout):
            return None
        self.beat = time.monotonic()
        return self._broker.submit(rows, self._timeout)

    def _land(
        self, first: Ticket | None, parts: Sequence[Sequence[DueRow]], held: _Held
    ) -> Published:
        """Wait for the answers, and publish the rest: of one key none before the one ahead of it.

        :param first: the first of ``parts``, which is on its way.
        :raises PublishError: none could be sent, for a reason that passes: leave the rows.
        """
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
            self._watch.note([(r.event_id, done.sent[r.id]) for r in rows if r.id in done.sent])
            if done.errors and time.monotonic() - self.beat > self._timeout / 2:
                break  # no answer came, and to wait for the others would take as long again
        errors = [error for _, error in done.errors.values()]
        if errors and not done.sent and all(error.temporary for error in errors):
            raise errors[0]
        return done

    def _checked(
        self, rows: Sequence[DueRow], results: Sequence[Result], held: _Held
    ) -> Sequence[Result]:
        """Look whether what the stream calls duplicates are ours; see ``brokers.storing``."""
        duplicates = [r for r in results if isinstance(r, StoredAck) and r.duplicate]
        if not duplicates or not self._is_ours(held, self._timeout + LOOK_TIMEOUT):
            return results
        return checked(rows, results, self._broker, self._timeout)

    def _mark(self, held: _Held, done: Published) -> None:
        failures = {row.id: self._failure(row, error) for row, error in done.errors.values()}
        started = time.monotonic()
        if not self._store.mark(held.lease, done.sent, failures):
            self._lose(held)
            return
        held.until = started + LEASE_SECONDS
        with contextlib.suppress(NatsPubsubError):  # it is tried again with the next check
            self._watch.settle()
        if done.sent:
            self.sent += len(done.sent)
            self._relayed(len(done.sent))

    def _is_ours(self, held: _Held, seconds: float) -> bool:
        """Whether nobody else sends these rows for so many seconds; renews if need be."""
        return time.monotonic() + seconds <= held.until or self._renew(held)

    def _failure(self, row: DueRow, error: PublishError) -> Failure:
        refused = not error.temporary
        limit = self._settings.outbox_max_attempts
        park = refused and row.attempts + 1 >= limit
        if park:
            _log.error("outbox row %d is parked after %d attempts: %s", row.id, limit, error)
        wait = min(FIRST_WAIT * 2**row.attempts, LONGEST_WAIT) if refused else PAUSE
        return Failure(str(error), wait * random.uniform(0.8, 1.2), refused, park)  # noqa: S311

    # --- looking after the streams and the table

    def _watch_streams(self) -> bool:
        """Look whether a stream has lost what it had; have it sent again if that is wished.

        :returns: whether there may be more to send again.
        """
        more = False
        if 0 not in self._held:
            return more
        if not self._broker.is_connected:  # later, not at once: nothing else may be due
            self._next_check = max(self._next_check, time.monotonic() + PAUSE)
            return more
        try:
            if self._watch.has_new or time.monotonic() >= self._next_check:
                self._next_check = time.monotonic() + CHECK_INTERVAL
                self._watch.check()
            if self._settings.outbox_resend_on_rewind and self._watch.rewound:
                more = self._watch.resend_some()
                self._next_poll = 0.0
        except NatsPubsubError as error:
            self._complain(f"the streams could not be looked at: {error}")
        return more

    def _clean(self) -> None:
        """Delete rows sent long ago, so many at a time that nobody waits for it."""
        if time.monotonic() < self._next_clean or 0 not in self._held:
            return
        retention = self._settings.outbox_retention  # not of what may have to be sent again
        counts = (
            0 if self._watch.rewound else self._store.purge(SENT, retention),
            self._also_clean(),
        )
        more = max(counts) >= CLEAN_BATCH
        self._next_clean = time.monotonic() + (CLEAN_PAUSE if more else CLEAN_INTERVAL)

    def _adopt(self) -> None:
        """Take over rows of partitions that are none of ours and nobody else's."""
        now = time.monotonic()
        if now < self._next_adoption or 0 not in self._held:
            return
        self._next_adoption = now + STAND_BY_INTERVAL
        if moved := self._store.adopt(self._settings.outbox_partitions):
            self._next_poll = 0.0
            if moved >= CLEAN_BATCH:
                self._next_adoption = now

    def _complain(self, what: str) -> None:
        """Log, one line per interval however often it fails."""
        now = time.monotonic()
        if not self._logged or now - self._logged > LOG_INTERVAL:
            self._logged = now
            _log.warning("the relay cannot send: %s", what)
