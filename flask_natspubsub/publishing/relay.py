"""The loop that sends the outbox: lease, read, publish, mark, and again.

What is read is published pipelined and marked in one transaction; no transaction is open
while the network is used. Killed between publish and mark, it sends the same rows again with
the same ids, which the stream, within its duplicate window, and the inbox beyond it, know.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..brokers.base import Broker, CoreMessage, StoredAck
from ..brokers.topology import wakeup_subject
from ..errors import NatsPubsubError, PublishError
from ..settings import Settings
from .outbox import SENT
from .publisher import STUCK
from .store import CLEAN_BATCH, LEASE_SECONDS, DueRow, Failure, OutboxStore

if TYPE_CHECKING:
    from ..database import Lease

_log = logging.getLogger("flask_natspubsub.relay")

FIRST_WAIT = 1.0
LONGEST_WAIT = 300.0
PAUSE = 1.0
STAND_BY_INTERVAL = 2.0
LOG_INTERVAL = 10.0
CLEAN_INTERVAL = 60.0
CLEAN_BATCHES = 5
#: What a relay that gives its leases back says to the others.
RELEASED = b"released"


@dataclass(slots=True)
class _Held:
    """A lease, and until when it is surely ours on this process's own clock."""

    lease: Lease
    until: float


class Relay:
    """Sends the rows of the partitions that it holds the leases of.

    :param relayed: told how many rows were sent.
    :param clean: called now and then, by one relay only, to delete what is old elsewhere.
    """

    def __init__(
        self,
        store: OutboxStore,
        broker: Broker,
        settings: Settings,
        relayed: Callable[[int], None],
        clean: Callable[[], object] = lambda: None,
    ) -> None:
        self.lease_lost = 0
        self.beat = time.monotonic()
        self._store = store
        self._broker = broker
        self._settings = settings
        self._relayed = relayed
        self._also_clean = clean
        host = socket.gethostname()[:32]
        self._owner = f"{host}:{os.getpid()}:{secrets.token_hex(4)}"
        self._held: dict[int, _Held] = {}
        self._next_try = 0.0
        self._next_clean = time.monotonic() + CLEAN_INTERVAL
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._logged = 0.0

    # --- life

    def run(self) -> None:
        """Relay until ``stop``; then give the leases back."""
        hints = self._broker.listen(wakeup_subject(self._settings), self._on_hint)
        try:
            while not self._stopping.is_set():
                self.beat = time.monotonic()
                pause = self._settings.outbox_poll_interval
                try:
                    if self.step():
                        continue
                    self._clean()
                except NatsPubsubError as error:
                    self._complain(str(error))
                    pause = PAUSE * random.uniform(0.75, 1.25)  # noqa: S311 - jitter
                self._wake.wait(pause)
                self._wake.clear()
        finally:
            self.release()
            with contextlib.suppress(NatsPubsubError):
                hints.stop()

    def stop(self) -> None:
        """Have ``run`` return after the batch in hand."""
        self._stopping.set()
        self._wake.set()

    def release(self) -> None:
        """Give the leases back, and tell the stand-bys."""
        held, self._held = list(self._held.values()), {}
        self._next_try = 0.0
        with contextlib.suppress(NatsPubsubError):
            for one in held:
                self._store.leases.release(one.lease)
        if held:
            self._broker.send(wakeup_subject(self._settings), RELEASED)

    def run_once(self) -> int:
        """Send all that is due, then give the leases back; returns how many were sent.

        :raises NatsPubsubError: the database, or the connection to the broker, failed.
        """
        count = 0
        try:
            while sent := self.step():
                count += sent
        finally:
            self.release()
        return count

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

    def _on_hint(self, message: CoreMessage) -> None:
        if message.data == RELEASED:
            self._next_try = 0.0
        if message.data == RELEASED or self._held:
            self._wake.set()

    # --- one round

    def step(self) -> int:
        """Send one batch of each partition held; returns how many rows were sent.

        :raises PublishError: none could be sent, for a reason that passes.
        """
        self._take_leases()
        return sum(self._send_batch(partition) for partition in list(self._held))

    def _take_leases(self) -> None:
        now = time.monotonic()
        for partition, held in list(self._held.items()):
            if held.until - now < LEASE_SECONDS * 2 / 3:
                self._renew(partition, held)
        if len(self._held) == self._settings.outbox_partitions or now < self._next_try:
            return
        self._next_try = now + STAND_BY_INTERVAL
        for partition in range(self._settings.outbox_partitions):
            if partition not in self._held:
                started = time.monotonic()
                lease = self._store.leases.acquire(f"outbox/{partition}", self._owner)
                if lease is not None:
                    self._held[partition] = _Held(lease, started + LEASE_SECONDS)
                    _log.info("relaying partition %d of the outbox", partition)

    def _renew(self, partition: int, held: _Held) -> None:
        started = time.monotonic()
        if self._store.leases.renew(held.lease):
            held.until = started + LEASE_SECONDS
        else:
            self._lose(partition)

    def _lose(self, partition: int) -> None:
        self.lease_lost += 1
        self._held.pop(partition, None)
        _log.warning("the lease of partition %d was lost to another relay", partition)

    def _send_batch(self, partition: int) -> int:
        held = self._held[partition]
        rows = self._store.due(partition, self._settings.outbox_batch_size)
        if not rows:
            return 0
        sent, errors = self._publish(rows, held)
        if not sent and errors and all(error.temporary for error in errors.values()):
            raise next(iter(errors.values()))  # nothing can be sent for now: leave the rows
        failures = {row.id: self._failure(row, errors[row.id]) for row in rows if row.id in errors}
        started = time.monotonic()
        if not self._store.mark(held.lease, sent, failures):
            self._lose(partition)
            return 0
        held.until = started + LEASE_SECONDS
        if sent:
            self._relayed(len(sent))
        return len(sent)

    def _publish(
        self, rows: Sequence[DueRow], held: _Held
    ) -> tuple[dict[int, StoredAck], dict[int, PublishError]]:
        """Publish in waves, so that of one key no row is sent before the one ahead is stored."""
        sent: dict[int, StoredAck] = {}
        errors: dict[int, PublishError] = {}
        stuck: set[str] = set()
        timeout = min(self._settings.publish_timeout, LEASE_SECONDS / 2)
        for wave in waves(rows):
            batch = [row for row in wave if row.ordering_key not in stuck]
            if not batch or time.monotonic() + timeout > held.until:
                break
            ticket = self._broker.submit([row.message for row in batch], timeout)
            ticket.wait(timeout + STUCK)
            for row, result in zip(batch, ticket.results, strict=True):
                if isinstance(result, StoredAck):
                    sent[row.id] = result
                else:
                    errors[row.id] = result or PublishError("no answer", outcome="unknown")
                    if row.ordering_key is not None:
                        stuck.add(row.ordering_key)
        return sent, errors

    def _failure(self, row: DueRow, error: PublishError) -> Failure:
        refused = not error.temporary
        limit = self._settings.outbox_max_attempts
        park = refused and row.attempts + 1 >= limit
        if park:
            _log.error("outbox row %d is parked after %d attempts: %s", row.id, limit, error)
        wait = min(FIRST_WAIT * 2**row.attempts, LONGEST_WAIT) if refused else PAUSE
        return Failure(str(error), wait * random.uniform(0.8, 1.2), refused, park)  # noqa: S311

    # --- looking after the table

    def _clean(self) -> None:
        """Delete rows sent long ago, a few thousand at a time so that nobody waits."""
        now = time.monotonic()
        if now < self._next_clean or 0 not in self._held:
            return
        retention = self._settings.outbox_retention
        more = all(self._store.purge(SENT, retention) == CLEAN_BATCH for _ in range(CLEAN_BATCHES))
        self._also_clean()
        self._next_clean = now + (0.0 if more else CLEAN_INTERVAL)

    def _complain(self, what: str) -> None:
        """Log, one line per interval however often it fails."""
        now = time.monotonic()
        if not self._logged or now - self._logged > LOG_INTERVAL:
            self._logged = now
            _log.warning("the relay cannot send: %s", what)


def waves(rows: Sequence[DueRow]) -> list[list[DueRow]]:
    """Split rows so that no wave has two of one ordering key; order is kept within a wave."""
    count: dict[str, int] = {}
    found: list[list[DueRow]] = []
    for row in rows:
        index = 0
        if row.ordering_key is not None:
            index = count.get(row.ordering_key, 0)
            count[row.ordering_key] = index + 1
        if index == len(found):
            found.append([])
        found[index].append(row)
    return found
