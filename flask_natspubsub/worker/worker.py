"""The worker: duties, handler threads, a monitor, and an orderly end."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self, cast

from ..brokers.base import Broker
from ..config.settings import Settings
from ..errors import NatsPubsubError, TablesMissing
from ..signals import worker_started, worker_stopped
from ..subscribing.durables import complaints
from ..subscribing.subscription import Subscription
from ..text import get_logger
from .async_handlers import AsyncHandlers
from .consumer import HAND_BYTES, LEAST_BYTES, Gate, Job, SubscriberConsumer
from .duty import Duty
from .processor import Emit, Processor

_log = get_logger("flask_natspubsub.worker")

#: The name of the duty that relays the outbox.
RELAY = "relay"
#: Seconds between two rounds of the monitor.
TICK = 0.25
IDLE_TICK = 0.2
#: Seconds that an outage may last for those who wait until there is no more work.
IDLE_PATIENCE = 10.0
#: Seconds that a thread goes on with one subscriber's messages before others have a turn.
TURN = 0.01
#: Seconds that a duty has at least to stop, though the time for handlers is used up: one that
#: feeds them, and one that outlasts them.
LEAST_STOP, LEAST_LAST_STOP = 0.1, 1.0


class Worker:
    """Runs subscribers and other duties in threads of this process.

    Use it as a context manager, or ``start`` and ``stop`` it. Its end has one order:

    1. The duties that give work to handlers are halted: no handler begins any more.
    2. They are stopped: pulls end, and what has not begun is handed back.
    3. The handlers that run are waited for.
    4. The other duties, such as the relay, are halted and stopped: they give up their leases.

    :param processors: what processes the messages of each subscriber to run.
    :param emit: sends a signal for the application.
    :param handlers: runs the async handlers of the processors; stopped with the worker.
    :param concurrency: handler threads, shared by all subscribers.
    :param duties: what it does besides consuming.
    :param declared: all subscribers of the app, by which consumers without one are found.
    :param tick: seconds between two rounds of the monitor, at most.
    """

    def __init__(
        self,
        broker: Broker,
        settings: Settings,
        processors: Sequence[Processor],
        emit: Emit,
        handlers: AsyncHandlers,
        *,
        concurrency: int | None = None,
        duties: Sequence[Duty] = (),
        declared: Sequence[Subscription] = (),
        tick: float = TICK,
    ) -> None:
        self.settings = settings
        self._declared = declared
        self.concurrency = concurrency or settings.concurrency
        self._broker = broker
        self._emit = emit
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._gate = Gate()
        self._threads: set[threading.Thread] = set()
        self._overdue: dict[threading.Thread, float] = {}
        self._monitor: threading.Thread | None = None
        self._wake_monitor = threading.Event()
        self._async = handlers
        self._state = "new"
        self._tick = tick
        self._beat = 0.0
        self._life = threading.Lock()
        hand_bytes = max(LEAST_BYTES, HAND_BYTES // (len(processors) or 1))
        self._consumers = [
            SubscriberConsumer(
                broker,
                processor,
                settings.stream,
                self.concurrency,
                settings.prefetch,
                self._queue.put,
                self._gate,
                hand_bytes,
            )
            for processor in processors
        ]
        #: In the order in which they are started.
        self._duties: list[Duty] = [*duties, *self._consumers]

    # --- life

    def start(self, stop: threading.Event | None = None) -> Self:
        """Start the threads and begin to pull.

        While the server is down this takes a moment for each subscriber.

        :param stop: once it is set, duties that have not begun do not begin.
        :raises TopologyError: a stream is missing or does not cover a subscriber's subjects.
        :raises BrokerError: the server does not answer, or refuses. After an error what was
            started is stopped again.
        """
        with self._life:
            if self._state != "new":
                raise RuntimeError("a worker is started once; make another")
            self._state = "running"
        for _ in range(self._handler_threads):
            self._start_thread()
        self._beat = time.monotonic()
        self._monitor = threading.Thread(target=self._watch, name="natspubsub-monitor", daemon=True)
        self._monitor.start()
        try:
            self._start_duties(stop)
        except BaseException:
            self.stop()
            raise
        self._emit(worker_started, worker=self)
        return self

    def _start_duties(self, stop: threading.Event | None) -> None:
        for duty in self._duties:
            if self._consumers and duty is self._consumers[0]:
                self._warn_of_stray_consumers()
            if self._state != "running" or (stop is not None and stop.is_set()):
                break
            duty.start()

    def _warn_of_stray_consumers(self) -> None:
        """Warn of subscribers that look renamed or removed, before a new one begins."""
        try:
            self._broker.connect(self.settings.connect_timeout)
            for line in complaints(self._broker, self.settings, self._declared):
                _log.warning("%s", line)
        except NatsPubsubError as error:
            _log.debug("the consumers of the app could not be listed: %s", error)

    def stop(self, timeout: float | None = None) -> bool:
        """Stop pulling, hand back what has not begun, finish what has, then end all else.

        :param timeout: seconds to wait for handlers; default ``NATSPUBSUB_SHUTDOWN_TIMEOUT``.
        :returns: whether every handler ended in that time.
        """
        with self._life:
            if self._state != "running":
                return True
            self._state = "stopping"
        deadline = time.monotonic() + (
            self.settings.shutdown_timeout if timeout is None else timeout
        )
        last = [duty for duty in self._duties if duty.outlasts_handlers]
        _stop([duty for duty in self._duties if duty not in last], deadline, LEAST_STOP)
        self._queue.put(None)
        clean = self._wait_for_handlers(deadline)
        if not clean:
            _log.warning("handlers are still running; their messages will be delivered again")
        self._state = "stopped"
        self._wake_monitor.set()
        if self._monitor is not None and self._monitor is not threading.current_thread():
            self._monitor.join(5)
        self._async.stop()
        _stop(last, deadline, LEAST_LAST_STOP)
        self._emit(worker_stopped, worker=self)
        return clean

    def _wait_for_handlers(self, deadline: float) -> bool:
        """Wait for the handler threads, except the caller's own; False if the time runs out."""
        while waiting := [thread for thread in list(self._threads) if self._is_busy(thread)]:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            waiting[0].join(min(left, TICK))
        return True

    def _is_busy(self, thread: threading.Thread) -> bool:
        return thread.is_alive() and thread is not threading.current_thread()

    def hand_back_all(self) -> None:
        """Hand back everything in hand, also what is being handled, and give up the leases.

        For the end of a process that will not wait for its handlers.
        """
        for duty in reversed(self._duties):
            duty.abandon()

    def __enter__(self) -> Self:
        return self.start() if self._state == "new" else self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def is_healthy(self) -> bool:
        """Whether the threads run, the broker is connected and every duty does its work."""
        return all(self.checks().values())

    def checks(self) -> dict[str, bool]:
        """Return by name whether each thing that a healthy worker needs is well."""
        found = {
            "running": self._state == "running" and self._is_watched(),
            "nats": self._broker.is_connected,
        }
        return found | {duty.name: duty.is_healthy for duty in self._duties}

    def load(self) -> dict[str, int]:
        """Return how many messages are in hand, and the limit, for health."""
        return {
            "messages_in_hand": sum(consumer.in_hand for consumer in self._consumers),
            "messages_in_hand_limit": sum(consumer.most_in_hand for consumer in self._consumers),
        }

    @property
    def loops(self) -> list[str]:
        """The names that ``ping`` gives to ``saw`` if all is well."""
        names = [duty.name for duty in self._duties]
        return ["monitor", "handler threads", "async handlers", *names]

    def ping(self, saw: Callable[[str], None]) -> None:
        """Ping every loop. Each live one calls ``saw(name)``, some from their own thread.

        Returns at once.
        """
        running = self._state == "running"
        if not running or self._is_watched():
            saw("monitor")
        alive = [thread for thread in list(self._threads) if thread.is_alive()]
        if not running or len(alive) >= self._handler_threads:
            saw("handler threads")
        self._async.ping(partial(saw, "async handlers"))
        for duty in self._duties:
            duty.ping(partial(saw, duty.name))

    @property
    def overdue(self) -> float:
        """For how many seconds a handler has been running beyond its time limit; 0 if none is."""
        since = [since for one, since in self._overdue.copy().items() if one.is_alive()]
        return time.monotonic() - min(since) if since else 0.0

    def _is_watched(self) -> bool:
        return time.monotonic() - self._beat < 20 * self._tick

    @property
    def subscribers(self) -> list[str]:
        """The names of the subscribers that run here."""
        return [consumer.subscription.name for consumer in self._consumers]

    @property
    def relays(self) -> bool:
        """Whether it relays the outbox too."""
        return any(duty.name == RELAY for duty in self._duties)

    def wait_until_idle(self, stop: threading.Event | None = None) -> None:
        """Return when no duty has anything left to do, or ``stop`` is set.

        :raises NatsPubsubError: the server or the database could not be asked for
            ``IDLE_PATIENCE`` seconds on end, or has not what it should have.
        """
        stop = stop or threading.Event()
        asked = time.monotonic()
        while not stop.wait(IDLE_TICK):
            try:
                if self._is_idle():
                    return
                asked = time.monotonic()
            except NatsPubsubError as error:
                if isinstance(error, TablesMissing) or time.monotonic() - asked > IDLE_PATIENCE:
                    raise

    def _is_idle(self) -> bool:
        """Ask all duties, and whether a message was handled meanwhile.

        That may have been a message for a subscriber that was asked before.
        """
        handled = [consumer.handled for consumer in self._consumers]
        idle = all(duty.is_idle() for duty in self._duties)
        return idle and handled == [consumer.handled for consumer in self._consumers]

    # --- the handler threads

    @property
    def _handler_threads(self) -> int:
        """How many there should be: none where there is nothing to handle."""
        return self.concurrency if self._consumers else 0

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="natspubsub-handler", daemon=True)
        self._threads = {old for old in self._threads if old.is_alive()} | {thread}
        thread.start()

    def _work(self) -> None:
        thread = threading.current_thread()
        job, since = self._queue.get(), time.monotonic()
        while job is not None:
            job.thread, following = thread, None
            try:
                # Its outcome is not kept: it keeps the error's frames.
                following = job.consumer.run(job).following
            except BaseException:  # noqa: BLE001 - a fault of this package must not end the thread
                _log.exception("%s: not processed", job.consumer.subscription.name)
            if job.expired:
                return  # a fresh thread took this one's place when the time limit ran out
            if following is not None and time.monotonic() - since < TURN:
                job = following  # to pass it on to another thread costs more than many a handler
                continue
            if following is not None:
                self._queue.put(following)
            job, since = self._queue.get(), time.monotonic()
        self._queue.put(None)  # the next thread ends of it too

    # --- the monitor

    def _watch(self) -> None:
        while self._state != "stopped":
            try:
                self._look_after_all()
            except Exception:  # noqa: BLE001 - without renewals messages would come twice
                _log.exception("looking after the handlers failed")
            waits = (consumer.ack_wait / 6 for consumer in self._consumers)
            self._wake_monitor.wait(min([self._tick, *waits]))

    def _look_after_all(self) -> None:
        now = time.monotonic()
        for duty in self._duties:
            for job in duty.look_after(now):
                self._expire(job)
        self._beat = now

    def _expire(self, job: Job) -> None:
        subscription = job.consumer.subscription
        what = "the handler has been running" if job.begun else "the inbox has been waiting"
        text = "%s: %s for more than %g s; its message is handed back"
        _log.error(text, subscription.name, what, subscription.timeout)
        if job.expired:
            self._replace(cast(threading.Thread, job.thread))
            self._gate.leave(job)
        time_out = partial(job.consumer.processor.time_out, job.delivery, begun=job.begun)
        # Storing a dead letter may take a while; the monitor has others to renew.
        threading.Thread(target=time_out, daemon=True).start()

    def _replace(self, late: threading.Thread) -> None:
        """Start a thread in place of one that hangs in a handler."""
        self._threads.discard(late)
        running_on = {one: since for one, since in self._overdue.items() if one.is_alive()}
        self._overdue = running_on | {late: time.monotonic()}
        self._start_thread()


def _stop(duties: Sequence[Duty], deadline: float, least: float) -> None:
    """Halt all of ``duties``, then stop each by the deadline, or within ``least`` seconds."""
    for duty in duties:
        duty.halt()
    for duty in duties:
        duty.stop(max(least, deadline - time.monotonic()))
