"""One subscriber in a worker: what it has in hand, and how much more it asks for.

Never more is in hand than can be worked off well within ``ack_wait``: the measured time of
the handler decides. A slow handler gets one message per free slot, a fast one hundreds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from ..brokers.base import Broker, Consumption, Delivery
from ..errors import NatsPubsubError
from ..text import get_logger
from .outcome import Outcome
from .processor import Processor

_log = get_logger("flask_natspubsub.worker")

#: Messages in hand should be worked off in this many seconds.
HAND = 0.5
#: Longest wait for the server when a pull is stopped.
STOP_TIMEOUT = 5.0
#: How fast the measured handler time follows: the weight of the newest message.
NEWEST = 0.1
#: Bytes that all subscribers of a worker together should have in hand. Half of what the server
#: keeps for a connection before it drops it as a slow consumer, by its default.
HAND_BYTES = 32 * 1024 * 1024
#: Each subscriber has at least these bytes, however many there are.
LEAST_BYTES = 2 * 1024 * 1024
#: What is kept, with each message, of the largest size seen lately.
FADING = 0.99


class Job(msgspec.Struct, eq=False):
    """A delivery in hand; times are of the monotonic clock."""

    consumer: SubscriberConsumer
    delivery: Delivery
    renewed: float
    started: float | None = None
    #: The one that handles it; set by the worker.
    thread: threading.Thread | None = None
    #: Whether its handler had begun when its time ran out.
    begun: bool = True
    expired: bool = False


class Ran(msgspec.Struct, frozen=True):
    """What came of running a job.

    :param outcome: None if the worker is stopping, and the message is handed back.
    :param following: the job to go on with, if there is one.
    """

    outcome: Outcome | None = None
    following: Job | None = None


class Gate:
    """Lets many in at once, or one alone; each says who it is.

    While nobody wants to be alone, to enter and to leave takes no lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._inside: set[object] = set()
        self._alone: object | None = None

    def enter(self, who: object) -> None:
        """Enter with others; waits while somebody is, or wants to be, alone."""
        # First in, then the look: who wants to be alone says so first and looks then.
        self._inside.add(who)
        while self._alone is not None:
            self.leave(who)
            with self._lock:
                self._changed.wait_for(lambda: self._alone is None)
            self._inside.add(who)

    @contextlib.contextmanager
    def alone(self, who: object) -> Iterator[None]:
        """Keep others out, wait until all have left, be alone."""
        with self._lock:
            self._changed.wait_for(lambda: self._alone is None)
            self._alone = who
            self._changed.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            self.leave(who)

    def leave(self, who: object) -> None:
        """Count ``who`` as gone, as one that hangs inside; leaving twice does no harm."""
        self._inside.discard(who)
        if self._alone is None:
            return  # so nobody waits
        with self._lock:
            if self._alone is who:
                self._alone = None
            self._changed.notify_all()


class SubscriberConsumer:
    """Pulls for one subscription and hands jobs to the worker's threads.

    No lock is shared by the handler threads: one that waits for a lock gives up the
    interpreter, and with handlers of microseconds they would do little else. What has to be
    decided once is decided by removing something: the first to remove it has it.

    :param slots: handler threads of the worker.
    :param prefetch: limit of messages in hand, unless there are more handlers at once.
    :param dispatch: puts a job on the worker's queue.
    :param gate: lets the handlers of a worker run side by side, or one alone.
    :param hand_bytes: limit of bytes in hand, unless the messages of all handlers are more.
    """

    def __init__(
        self,
        broker: Broker,
        processor: Processor,
        stream: str,
        slots: int,
        prefetch: int,
        dispatch: Callable[[Job], None],
        gate: Gate,
        hand_bytes: int = HAND_BYTES,
    ) -> None:
        self.processor = processor
        self.subscription = processor.subscription
        self.concurrency = min(self.subscription.concurrency, slots)
        #: How many deliveries may be in hand, however fast they are handled.
        self.most_in_hand = max(prefetch, self.concurrency)
        #: Grows with every message handled; not their exact number.
        self.handled = 0
        self._broker = broker
        self._stream = stream
        self._dispatch = dispatch
        self._gate = gate
        self._jobs: set[Job] = set()
        #: Of those, the ones that no handler has begun with.
        self._waiting: set[Job] = set()
        self._backlog: deque[Job] = deque()
        #: One token for each handler that may be running besides those that are.
        self._free = deque(range(self.concurrency))
        self._asking = threading.Lock()
        self._asked = 0
        self._received = 0
        self._limit = self.concurrency
        self._average = 0.0
        self._hand_bytes = hand_bytes
        #: How large a message may well be, from those that came last.
        self._size = 1.0
        self._consumption: Consumption | None = None
        self._stopping = False
        self._ended = False
        #: When the monitor last looked, and how many had been handled then.
        self._looked = time.monotonic(), 0

    # --- life: the members of a duty

    #: It gives work to handlers, so it is stopped before them.
    outlasts_handlers = False

    @property
    def name(self) -> str:
        """The name in health checks and heartbeats."""
        return f"subscriber {self.subscription.name}"

    def start(self) -> None:
        """Make the durable consumer and begin to pull; the errors of ``Broker.consume``."""
        config = self.subscription.consumer_config(self._stream)
        self._consumption = self._broker.consume(config, self._deliver)
        self._consumption.bound(self._hand_bytes, self._spared)
        if self._stopping:
            self._end(self._consumption, STOP_TIMEOUT)
        else:
            self._top_up()

    def halt(self) -> None:
        """Begin no more handlers; ``stop`` follows."""
        self._stopping = True

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """Stop pulling, and hand back what no handler has begun with.

        :param timeout: longest wait for the server, never more than ``STOP_TIMEOUT`` seconds.
        """
        self.halt()
        if self._consumption is not None and not self._ended:
            self._end(self._consumption, min(timeout, STOP_TIMEOUT))
        # Only now: while the pull was open, the server would have given it back to us at once.
        self._backlog.clear()
        for job in list(self._waiting):
            if _take(self._waiting, job):
                self._jobs.discard(job)
                job.delivery.nak()

    def _end(self, consumption: Consumption, timeout: float) -> None:
        try:
            consumption.stop(timeout)
        except NatsPubsubError as error:
            _log.warning("%s: stopped without the server: %s", self.subscription.name, error)
        self._ended = True

    def abandon(self) -> None:
        """Stop pulling, and hand back everything in hand, begun or not."""
        self.stop()
        for job in list(self._jobs):
            job.delivery.nak()

    @property
    def in_hand(self) -> int:
        """How many deliveries are waiting or being handled here."""
        return len(self._jobs)

    @property
    def is_healthy(self) -> bool:
        """Whether the pull is alive."""
        return self._consumption is not None and self._consumption.is_healthy

    @property
    def ack_wait(self) -> float:
        """Seconds after which the server delivers again what it hears nothing of."""
        own = self.subscription.ack_wait
        return own if self._consumption is None else min(own, self._consumption.ack_wait)

    def ping(self, saw: Callable[[], None]) -> None:
        """Call ``saw`` in the loop that pulls; at once while the pull is being made."""
        if self._consumption is None:
            saw()
        else:
            self._consumption.ping(saw)

    def wake(self) -> None:
        """Do nothing: the server delivers messages without being asked anew."""

    def is_idle(self) -> bool:
        """Whether nothing is in hand here, and nothing is pending or unsettled at the server."""
        if self._jobs:
            return False
        found = None if self._consumption is None else self._consumption.consumer
        stream, durable = found or (self._stream, self.subscription.durable)
        info = self._broker.consumer_info(stream, durable)
        return info is not None and not info.pending and not info.ack_pending

    # --- the broker's thread

    def _deliver(self, delivery: Delivery) -> None:
        if self._received < self._asked:
            self._received += 1
        self._size = max(len(delivery.data), self._size * FADING)
        job = Job(self, delivery, time.monotonic())
        self._jobs.add(job)
        self._waiting.add(job)
        if not self._stopping:
            self._backlog.append(job)
            if self._free:
                self._hand_out()

    def _spared(self, count: int) -> None:
        """Count ``count`` requested messages as not coming: they are too large."""
        self._received = min(self._asked, self._received + count)
        if self._is_low():
            self._top_up()

    # --- any thread

    def _hand_out(self) -> None:
        """Give waiting jobs to the threads, as far as there are handlers free."""
        while self._backlog:
            try:
                token = self._free.pop()
            except IndexError:
                return  # the thread that gives a token back looks here again
            try:
                job = self._backlog.popleft()
            except IndexError:
                self._free.append(token)
            else:
                self._dispatch(job)

    def _next(self) -> Job | None:
        """Return the job to go on with; if there is none, another handler may run."""
        try:
            return self._backlog.popleft()
        except IndexError:
            self._free.append(0)
            self._hand_out()
            return None

    # --- the handler threads

    def run(self, job: Job) -> Ran:
        """Process a job, alone in the worker if it is over its limit, and ask for more."""
        delivery = job.delivery
        if delivery.attempt > self.subscription.max_deliver and self.processor.is_over_limit(
            delivery
        ):
            with self._gate.alone(job):
                return self._run(job, self.processor.process_alone)
        self._gate.enter(job)
        try:
            return self._run(job, self.processor.process)
        finally:
            self._gate.leave(job)

    def _run(self, job: Job, process: Callable[[Delivery], Outcome]) -> Ran:
        if self._stopping or not _take(self._waiting, job):
            return Ran()
        job.started = time.monotonic()
        try:
            outcome = process(job.delivery)
        except BaseException:
            following = self._finished(job, job.started)
            if following is not None:
                self._dispatch(following)
            raise
        return Ran(outcome, self._finished(job, job.started))

    def _finished(self, job: Job, started: float) -> Job | None:
        """Count a job as done; returns the next one."""
        self.handled += 1
        if not _take(self._jobs, job):
            job.expired = True  # its place was given away when its time ran out
            return None
        seconds = time.monotonic() - started
        self._average += (seconds - self._average) * NEWEST if self._average else seconds
        following = self._next()
        if self._is_low():
            self._top_up()
        return following

    def _top_up(self) -> None:
        """Ask for more once half of what may be in hand is gone, or a thread would be idle."""
        while self._is_low():
            if not self._asking.acquire(blocking=False):
                return  # the thread that has it looks again after releasing it
            try:
                coming = self._coming()
                self._limit = self._workable()
                more = self._limit - coming
                self._asked += max(0, more)
            finally:
                self._asking.release()
            if more <= 0 or self._consumption is None:
                return
            self._consumption.request(more)

    def _is_low(self) -> bool:
        coming = self._coming()
        low = coming <= self._limit // 2 or coming < self.concurrency
        return low and not self._stopping and self._consumption is not None

    def _coming(self) -> int:
        """Return how many are in hand or asked for."""
        return len(self._jobs) + self._asked - self._received

    def _workable(self) -> int:
        """Return how many may be in hand, by the handler times and sizes measured so far."""
        if self.subscription.ordered or not self._average:
            return self.concurrency
        seconds = self.concurrency * min(HAND, self.ack_wait / 6)
        by_time = min(int(seconds / max(self._average, 1e-6)), self._limit * 2, self.most_in_hand)
        return max(self.concurrency, min(by_time, int(self._hand_bytes / self._size)))

    # --- the worker's monitor

    def look_after(self, now: float) -> list[Job]:
        """Renew what is in hand; return the jobs whose handler has just run out of time.

        Those that are ``expired`` have lost their place: the worker starts a thread in place of
        each. The others have come to their end at this very moment.
        """
        self._notice_a_standstill(now)
        late = [job for job in list(self._jobs) if self._is_late(job, now)]
        for job in late:
            self._expire(job)
        renew_after = self.ack_wait / 3
        for job in list(self._jobs):
            if now - job.renewed >= renew_after:
                job.renewed = now
                job.delivery.in_progress()
        return late

    def _notice_a_standstill(self, now: float) -> None:
        """Warn if nothing was renewed for so long that the server delivers it again."""
        (looked, handled), self._looked = self._looked, (now, self.handled)
        if now - looked > self.subscription.ack_wait and (self._jobs or self.handled != handled):
            _log.warning(
                "%s: this process stood still for %.1f s, longer than ack_wait (%g s), so what it "
                "had in hand is delivered again. A handler whose C code keeps the interpreter to "
                "itself does this, and so does a machine that is paused. Raise ack_wait, or let "
                "a process of its own do such work.",
                self.subscription.name,
                now - looked,
                self.subscription.ack_wait,
            )

    def _is_late(self, job: Job, now: float) -> bool:
        """Whether the time is up, and the handler has not just come to its end."""
        if job.started is None or not self.processor.is_late(job.delivery, job.started, now):
            return False
        job.begun = self.processor.has_begun(job.delivery)
        return self.processor.take_over(job.delivery)

    def _expire(self, job: Job) -> None:
        """Give the place of a job away, unless it has come to its end."""
        if _take(self._jobs, job):
            job.expired = True
            following = self._next()
            if following is not None:
                self._dispatch(following)
            self._top_up()


def _take(jobs: set[Job], job: Job) -> bool:
    """Remove ``job``; False if another thread was quicker."""
    try:
        jobs.remove(job)
    except KeyError:
        return False
    return True
