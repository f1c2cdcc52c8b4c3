"""A loop that does its work only while it holds a lease: the relay's, and any other leader's.

Of several processes that run the same loop, one holds a lease and works; the others stand by and
take over when the lease expires, or at once when it is given back.
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
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import NatsPubsubError
from ..text import get_logger
from .leases import Lease, Leases

LOG_INTERVAL = 10.0
#: Shares of a lease's length: renewed when less than this is left (one publish may take that
#: long); how often a stand-by tries to take it; how long one round may take.
RENEW_BEFORE = 2 / 3
STAND_BY = 1 / 5
ROUND = 6


@dataclass(slots=True)
class HeldLease:
    """A lease, and until when it is surely ours by this process's monotonic clock."""

    lease: Lease
    until: float

    @property
    def name(self) -> str:
        """The name of the lease."""
        return self.lease.name


class LeasedLoop(ABC):
    """Holds leases and does what is due, in one thread.

    A subclass says what the work is (``work``) and when some is due without a wake-up
    (``next_due``). ``turn`` is one round; ``run`` goes round until ``stop``.

    :param leases: the table of leases; its ``seconds`` set the pace of renewing and standing by.
    :param names: the leases to hold; the loop may hold some while others hold the rest.
    """

    log = get_logger("flask_natspubsub.leases")
    #: Logged when a round fails; ``%s`` is the error.
    complaint = "the work under a lease failed: %s"
    #: Logged with the traceback when a round fails in a way that this package did not foresee.
    unforeseen = "the work under a lease failed in an unforeseen way"

    def __init__(self, leases: Leases, names: Sequence[str]) -> None:
        #: How often another process had taken a lease before this one renewed it.
        self.lease_lost = 0
        #: When the last round began, on the monotonic clock; minus infinity once ``run`` is over.
        self.beat = time.monotonic()
        #: Seconds to wait after a round that failed, give or take a quarter.
        self.pause = 1.0
        self._leases = leases
        self._names = names
        self._owner = f"{socket.gethostname()[:32]}:{os.getpid()}:{secrets.token_hex(4)}"
        self._held: dict[str, HeldLease] = {}
        self._next_try = 0.0
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._logged = 0.0

    # --- life

    def run(self) -> None:
        """Work until ``stop``; then give the leases back."""
        try:
            while not self._stopping.is_set():
                self._wake.wait(self.turn())
        finally:
            self.beat = -math.inf
            self.release()

    def turn(self) -> float:
        """Do one round: renew the leases, then whatever is due.

        Errors are logged, and followed by a pause.

        :returns: the seconds until something is due again.
        """
        self.beat = time.monotonic()
        woken = self._wake.is_set()
        self._wake.clear()
        try:
            self.take_leases()
            self.work(woken)
        except NatsPubsubError as error:
            self.complain(str(error))
        except Exception:
            self.log.exception(self.unforeseen)
        else:
            return max(0.0, min(self._next_lease_due(), self.next_due()) - time.monotonic())
        self.failed()
        self._stopping.wait(self.pause * random.uniform(0.75, 1.25))  # noqa: S311 - jitter
        return 0.0

    @abstractmethod
    def work(self, woken: bool) -> None:
        """Do what is due, as far as the leases held allow.

        :param woken: whether ``wake`` was called since the round before.
        """

    @abstractmethod
    def next_due(self) -> float:
        """Return when work is due again, on the monotonic clock; infinity: after ``wake`` only."""

    @abstractmethod
    def is_idle(self) -> bool:
        """Whether nothing is due, whichever process does it.

        :raises DatabaseError: the database failed.
        """

    def failed(self) -> None:  # noqa: B027 - not every loop has something to do
        """Prepare the next round after one that failed."""

    def taken(self, name: str) -> None:  # noqa: B027 - not every loop has something to do
        """Prepare the work under a lease that was just taken."""

    def wake(self) -> None:
        """Look for work now instead of when it is due; any thread, returns at once."""
        if self._held:
            self._wake.set()

    def stop(self) -> None:
        """Make ``run`` return once the work in hand is done; any thread, returns at once."""
        self._stopping.set()
        self._wake.set()

    @property
    def is_alive(self) -> bool:
        """Whether ``run`` goes round; the calls of each round have timeouts."""
        return time.monotonic() - self.beat < ROUND * self._leases.seconds

    # --- leases

    def take_leases(self) -> None:
        """Renew the leases held that end soon; now and then, try to take the others."""
        renew_before = RENEW_BEFORE * self._leases.seconds
        for held in list(self._held.values()):
            if held.until - time.monotonic() <= renew_before:
                self.renew(held)
        now = time.monotonic()
        if len(self._held) == len(self._names) or now < self._next_try:
            return
        self._next_try = now + STAND_BY * self._leases.seconds
        for name in self._names:
            if name not in self._held:
                self._take(name)

    def try_now(self) -> None:
        """Try to take leases in the next round, and begin it now: one was given back."""
        self._next_try = 0.0
        self._wake.set()

    @property
    def has_tried(self) -> bool:
        """Whether it has tried to take its leases."""
        return self._next_try > 0

    def _take(self, name: str) -> None:
        started = time.monotonic()
        lease = self._leases.acquire(name, self._owner)
        if lease is not None:
            self._held[name] = HeldLease(lease, started + self._leases.seconds)
            self.taken(name)

    def renew(self, held: HeldLease) -> bool:
        """Extend a lease; False if it is lost."""
        started = time.monotonic()
        if not self._leases.renew(held.lease):
            self.lose(held)
            return False
        self.renewed(held, started)
        return True

    def renewed(self, held: HeldLease, asked: float) -> None:
        """Note that a lease was extended by a statement begun at ``asked``, monotonic time."""
        held.until = asked + self._leases.seconds

    def lose(self, held: HeldLease) -> None:
        """Note that another process has taken a lease."""
        if self._held.pop(held.name, None) is not None:
            self.lease_lost += 1
            self.lost(held.name)

    def lost(self, name: str) -> None:  # noqa: B027 - not every loop has something to do
        """Stop the work under a lease that another process has taken."""

    def holds(self, name: str) -> bool:
        """Whether it has taken the lease and not lost it since."""
        return name in self._held

    def is_ours(self, held: HeldLease, seconds: float) -> bool:
        """Whether a lease is ours for another ``seconds``; renews it if need be."""
        return time.monotonic() + seconds <= held.until or self.renew(held)

    def release(self) -> None:
        """Give the leases back, so that another process takes them at once; any thread."""
        held, self._held = list(self._held.values()), {}
        self._next_try = 0.0
        for one in held:
            with contextlib.suppress(NatsPubsubError):
                self._leases.release(one.lease)
        if held:
            self.released()

    def released(self) -> None:  # noqa: B027 - not every loop has something to do
        """Tell the stand-bys that leases are free."""

    def _next_lease_due(self) -> float:
        renew_before = RENEW_BEFORE * self._leases.seconds
        times = [held.until - renew_before for held in self._held.values()]
        if len(self._held) < len(self._names):
            times.append(self._next_try)
        return min(times, default=math.inf)

    # --- log

    def complain(self, error: str) -> None:
        """Log what keeps it from working; one line in ``LOG_INTERVAL`` seconds."""
        now = time.monotonic()
        if not self._logged or now - self._logged > LOG_INTERVAL:
            self._logged = now
            self.log.warning(self.complaint, error)
