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

from ..brokers.base import Broker, Consumption, Delivery
from ..errors import NatsPubsubError
from ..subscribing.processor import Outcome, Processor

_log = logging.getLogger("flask_natspubsub.worker")

#: Messages in hand should be worked off in this many seconds.
HAND = 0.5
MOST_IN_HAND = 1_000
#: How fast the measured handler time follows: the weight of the newest message.
NEWEST = 0.1


class Job:
    """A delivery in hand."""

    __slots__ = ("consumer", "delivery", "expired", "renewed", "started")

    def __init__(self, consumer: SubscriberConsumer, delivery: Delivery) -> None:
        self.consumer = consumer
        self.delivery = delivery
        self.renewed = time.monotonic()
        self.started: float | None = None
        self.expired = False


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
        self._consumption = self._broker.consume(config, self._deliver)
        self._top_up()

    def stop_pulling(self) -> None:
        """Ask for no more, and hand back what has not been started."""
        self._stopping = True
        if self._consumption is not None:
            try:
                self._consumption.stop()
            except NatsPubsubError as error:
                _log.warning("%s: stopped without the server: %s", self.subscription.name, error)
        with self._lock:
            waiting, self._backlog = list(self._backlog), deque()
        for job in waiting:
            self.hand_back(job)

    def hand_back(self, job: Job) -> None:
        """Give back a job that was not started."""
        job.delivery.nak()
        with self._lock:
            self._jobs.discard(job)

    @property
    def in_hand(self) -> int:
        """How many deliveries are waiting or being handled here."""
        return len(self._jobs)

    @property
    def is_healthy(self) -> bool:
        """Whether the pull is alive."""
        return self._consumption is not None and self._consumption.is_healthy

    def is_idle(self) -> bool:
        """Whether nothing is in hand here, and nothing is pending or unsettled at the server."""
        if self._jobs:
            return False
        info = self._broker.consumer_info(self._stream, self.subscription.durable)
        return info is not None and not info.pending and not info.ack_pending

    # --- the broker's thread

    def _deliver(self, delivery: Delivery) -> None:
        job = Job(self, delivery)
        with self._lock:
            self._requested = max(0, self._requested - 1)
            if self._stopping:
                delivery.nak()
                return
            self._jobs.add(job)
            if self._running >= self.concurrency:
                self._backlog.append(job)
                return
            self._running += 1
        self._dispatch(job)

    # --- the handler threads

    def run(self, job: Job, process: Callable[[Delivery], Outcome]) -> Outcome:
        """Process a job, then pass on the next one and ask for more."""
        job.started = time.monotonic()
        outcome = process(job.delivery)
        self._finished(job, time.monotonic() - job.started)
        return outcome

    def _finished(self, job: Job, seconds: float) -> None:
        with self._lock:
            self.handled += 1
            self._jobs.discard(job)
            self._measure(seconds)
            following = self._next() if not job.expired else None
        if following is not None:
            self._dispatch(following)
        self._top_up()

    def _next(self) -> Job | None:
        if self._backlog:
            return self._backlog.popleft()
        self._running -= 1
        return None

    def _measure(self, seconds: float) -> None:
        self._average += (seconds - self._average) * NEWEST if self._average else seconds
        workable = self.concurrency * min(HAND, self.subscription.ack_wait / 6)
        wanted = int(workable / max(self._average, 1e-6))
        wanted = min(wanted, self._limit * 2, MOST_IN_HAND)
        self._limit = (
            self.concurrency if self.subscription.ordered else max(self.concurrency, wanted)
        )

    def _top_up(self) -> None:
        """Ask for more once half of what may be in hand is gone."""
        with self._lock:
            coming = len(self._jobs) + self._requested
            if self._stopping or self._consumption is None or coming > self._limit // 2:
                return
            more = self._limit - coming
            self._requested += more
        self._consumption.request(more)

    # --- the worker's monitor

    def look_after(self, now: float) -> list[Job]:
        """Renew what is in hand; return the jobs whose handler has just run out of time.

        Their slots are free from here on: the worker starts a thread in place of each.
        """
        with self._lock:
            jobs = [job for job in self._jobs if not job.expired]
            late = [job for job in jobs if self._is_late(job, now)]
            following = [self._expire(job) for job in late]
        for job in jobs:
            if not job.expired and now - job.renewed >= self.subscription.ack_wait / 3:
                job.renewed = now
                job.delivery.in_progress()
        for waiting in following:
            if waiting is not None:
                self._dispatch(waiting)
        return late

    def _is_late(self, job: Job, now: float) -> bool:
        return job.started is not None and now - job.started > self.subscription.timeout

    def _expire(self, job: Job) -> Job | None:
        job.expired = True
        return self._next()
