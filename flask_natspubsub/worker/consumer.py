"""One subscriber in a worker: what it has in hand, and how much more it asks for.

Never more is in hand than can be worked off well within ``ack_wait``: the measured time of
the handler decides. A slow handler gets one message per free slot, a fast one hundreds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec

from ..brokers.base import Broker, Consumption, Delivery
from ..errors import NatsPubsubError
from ..subscribing.processor import Outcome, Processor

_log = logging.getLogger("flask_natspubsub.worker")

#: Messages in hand should be worked off in this many seconds.
HAND = 0.5
MOST_IN_HAND = 1_000
#: Longest wait for the server when a pull is stopped.
STOP_TIMEOUT = 5.0
#: How fast the measured handler time follows: the weight of the newest message.
NEWEST = 0.1


class Job(msgspec.Struct, eq=False):
    """A delivery in hand; times are of the monotonic clock."""

    consumer: SubscriberConsumer
    delivery: Delivery
    renewed: float
    started: float | None = None
    thread: threading.Thread | None = None
    expired: bool = False


class SubscriberConsumer:
    """Pulls for one subscription and hands jobs to the worker's threads.

    :param dispatch: puts a job on the worker's queue.
    :param slots: handler threads of the worker.
    """

    def __init__(
        self,
        broker: Broker,
        processor: Processor,
        stream: str,
        slots: int,
        dispatch: Callable[[Job], None],
    ) -> None:
        self.processor = processor
        self.subscription = processor.subscription
        self.concurrency = min(self.subscription.concurrency, slots)
        self.handled = 0
        self._broker = broker
        self._stream = stream
        self._dispatch = dispatch
        self._lock = threading.Lock()
        self._jobs: set[Job] = set()
        self._backlog: deque[Job] = deque()
        self._running = 0
        self._requested = 0
        self._limit = self.concurrency
        self._average = 0.0
        self._consumption: Consumption | None = None
        self._stopping = False

    # --- life

    def start(self) -> None:
        """Make the durable consumer and begin to pull; the errors of ``Broker.consume``."""
        config = self.subscription.consumer_config(self._stream)
        consumption = self._broker.consume(config, self._deliver)
        with self._lock:
            self._consumption = consumption
            stopping = self._stopping
        if stopping:
            self._end(consumption, STOP_TIMEOUT)
        else:
            self._top_up()

    def halt(self) -> None:
        """Begin no more handlers; ``stop_pulling`` is to follow."""
        with self._lock:
            self._stopping = True

    def stop_pulling(self, timeout: float = STOP_TIMEOUT) -> None:
        """Ask for no more, and hand back what no handler has begun with."""
        self.halt()
        if self._consumption is not None:
            self._end(self._consumption, timeout)
        # Only now: while the pull was open, the server would have given it back to us at once.
        with self._lock:
            waiting = [job for job in self._jobs if job.started is None]
            self._jobs.difference_update(waiting)
            self._backlog.clear()
        for job in waiting:
            job.delivery.nak()

    def _end(self, consumption: Consumption, timeout: float) -> None:
        try:
            consumption.stop(timeout)
        except NatsPubsubError as error:
            _log.warning("%s: stopped without the server: %s", self.subscription.name, error)

    def abandon(self) -> None:
        """Give back all that is in hand, begun or not."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.delivery.nak()

    @property
    def in_hand(self) -> int:
        """How many deliveries are waiting or being handled here."""
        return len(self._jobs)

    @property
    def is_healthy(self) -> bool:
        """Whether the pull is alive."""
        return self._consumption is not None and self._consumption.is_healthy

    def nudge(self, saw: Callable[[], None]) -> None:
        """Have ``saw`` called by the loop that pulls; at once while the pull is being made."""
        if self._consumption is None:
            saw()
        else:
            self._consumption.nudge(saw)

    def is_idle(self) -> bool:
        """Whether nothing is in hand here, and nothing is pending or unsettled at the server."""
        if self._jobs:
            return False
        info = self._broker.consumer_info(self._stream, self.subscription.durable)
        return info is not None and not info.pending and not info.ack_pending

    # --- the broker's thread

    def _deliver(self, delivery: Delivery) -> None:
        job = Job(self, delivery, time.monotonic())
        with self._lock:
            if self._requested:
                self._requested -= 1
            self._jobs.add(job)
            if self._stopping:
                return
            if self._running >= self.concurrency:
                self._backlog.append(job)
                return
            self._running += 1
        self._dispatch(job)

    # --- the handler threads

    def run(
        self, job: Job, process: Callable[[Delivery], Outcome]
    ) -> tuple[Outcome | None, Job | None]:
        """Process a job, and ask for more.

        :returns: what became of it, None if the worker is stopping and it is handed back; and
            the job to go on with, if there is one.
        """
        with self._lock:
            if self._stopping:
                return None, None
            job.thread = threading.current_thread()
            job.started = started = time.monotonic()
        try:
            outcome = process(job.delivery)
        except BaseException:
            self._go_on(self._finished(job, started))
            raise
        return outcome, self._finished(job, started)

    def _finished(self, job: Job, started: float) -> Job | None:
        """Count a job as done; returns the next one."""
        seconds = time.monotonic() - started
        with self._lock:
            self.handled += 1
            if job.expired:
                return None  # its place was given away when its time ran out
            self._jobs.discard(job)
            self._average += (seconds - self._average) * NEWEST if self._average else seconds
            following = self._next()
            more = self._missing()
        if more and self._consumption is not None:
            self._consumption.request(more)
        return following

    def _go_on(self, following: Job | None) -> None:
        if following is not None:
            self._dispatch(following)
        self._top_up()

    def _next(self) -> Job | None:
        if self._backlog:
            return self._backlog.popleft()
        self._running -= 1
        return None

    def _top_up(self) -> None:
        with self._lock:
            more = self._missing()
        if more and self._consumption is not None:
            self._consumption.request(more)

    def _missing(self) -> int:
        """Return how many to ask for, and count them as asked for; to be called with the lock.

        None until half of what may be in hand is gone, or a thread would be idle.
        """
        coming = len(self._jobs) + self._requested
        if coming > self._limit // 2 and coming >= self.concurrency:
            return 0
        if self._stopping or self._consumption is None:
            return 0
        self._limit = self._workable()
        more = max(0, self._limit - coming)
        self._requested += more
        return more

    def _workable(self) -> int:
        """Return how many may be in hand, by the handler times measured so far."""
        if self.subscription.ordered or not self._average:
            return self.concurrency
        seconds = self.concurrency * min(HAND, self.subscription.ack_wait / 6)
        wanted = min(int(seconds / max(self._average, 1e-6)), self._limit * 2, MOST_IN_HAND)
        return max(self.concurrency, wanted)

    # --- the worker's monitor

    def look_after(self, now: float) -> list[Job]:
        """Renew what is in hand; return the jobs whose handler has just run out of time.

        Their slots are free from here on: the worker starts a thread in place of each.
        """
        with self._lock:
            late = [job for job in self._jobs if self._is_late(job, now)]
            following = [self._expire(job) for job in late]
            jobs = list(self._jobs)
        for job in jobs:
            if now - job.renewed >= self.subscription.ack_wait / 3:
                job.renewed = now
                job.delivery.in_progress()
        for waiting in following:
            self._go_on(waiting)
        return late

    def _is_late(self, job: Job, now: float) -> bool:
        """Whether the time is up, and the handler has not just come to its end."""
        return (
            job.started is not None
            and now - job.started > self.subscription.timeout
            and self.processor.take_over(job.delivery)
        )

    def _expire(self, job: Job) -> Job | None:
        job.expired = True
        self._jobs.discard(job)
        return self._next()
