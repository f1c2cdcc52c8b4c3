"""The worker: handler threads, a monitor, and an orderly end."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

from ..brokers.base import Broker
from ..brokers.loop import BackgroundLoop
from ..errors import RegistrationError, TopologyError
from ..settings import Settings
from ..signals import worker_started, worker_stopped
from ..subscribing.deadletters import DeadLetterBox
from ..subscribing.processor import Emit, HandlerTimeout, Outcome, Processor
from ..subscribing.subscription import Subscription
from .consumer import Job, SubscriberConsumer

_log = logging.getLogger("flask_natspubsub.worker")

TICK = 0.25
IDLE_TICK = 0.2


class Gate:
    """Lets many in at once, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Enter with others; waits while somebody is, or wants to be, alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep others out, wait until all have left, be alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = True
            self._changed.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


class Worker:
    """Runs subscribers in threads of this process.

    Use it as a context manager, or ``start`` and ``stop`` it.

    :param subscriptions: what to run.
    :param app_context: makes a fresh application context for each message.
    :param emit: sends a signal for the application.
    :param concurrency: handler threads, shared by all subscribers.
    """

    def __init__(
        self,
        broker: Broker,
        settings: Settings,
        subscriptions: Sequence[Subscription],
        app_context: Callable[[], AbstractContextManager[object]],
        emit: Emit,
        concurrency: int | None = None,
    ) -> None:
        self.settings = settings
        self.concurrency = concurrency or settings.concurrency
        self._broker = broker
        self._emit = emit
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._gate = Gate()
        self._threads: set[threading.Thread] = set()
        self._monitor: threading.Thread | None = None
        self._wake_monitor = threading.Event()
        self._async: BackgroundLoop | None = None
        self._state = "new"
        self._beat = 0.0
        self._life = threading.Lock()
        box = DeadLetterBox(broker, settings)
        self._consumers = [
            SubscriberConsumer(
                broker,
                Processor(subscription, box, app_context, emit, self._run_async),
                settings.stream,
                self.concurrency,
                self._queue.put,
            )
            for subscription in subscriptions
        ]

    # --- life

    def start(self) -> Self:
        """Start the threads and begin to pull.

        :raises TopologyError: a stream is missing or does not cover a subscriber's subjects;
            what was started is stopped again.
        """
        with self._life:
            if self._state != "new":
                raise RuntimeError("a worker is started once; make another")
            self._state = "running"
        for _ in range(self.concurrency):
            self._start_thread()
        self._beat = time.monotonic()
        self._monitor = threading.Thread(target=self._watch, name="natspubsub-monitor", daemon=True)
        self._monitor.start()
        try:
            for consumer in self._consumers:
                consumer.start()
        except TopologyError:
            self.stop(0)
            raise
        self._emit(worker_started, worker=self)
        return self

    def stop(self, timeout: float | None = None) -> bool:
        """Stop pulling, hand back what has not begun, finish what has.

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
        for consumer in self._consumers:
            consumer.stop_pulling()
        self._hand_back_queued()
        for _ in range(len(self._threads)):
            self._queue.put(None)
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))
        clean = not any(thread.is_alive() for thread in self._threads)
        if not clean:
            _log.warning("handlers are still running; their messages will be delivered again")
        self._state = "stopped"
        self._wake_monitor.set()
        if self._monitor is not None and self._monitor is not threading.current_thread():
            self._monitor.join(5)
        if self._async is not None:
            self._async.stop()
        self._emit(worker_stopped, worker=self)
        return clean

    def __enter__(self) -> Self:
        return self.start() if self._state == "new" else self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def is_healthy(self) -> bool:
        """Whether the threads run, the broker is connected and every pull is alive."""
        return (
            self._state == "running"
            and time.monotonic() - self._beat < 20 * TICK
            and self._broker.is_connected
            and all(consumer.is_healthy for consumer in self._consumers)
        )

    @property
    def subscribers(self) -> list[str]:
        """The names of the subscribers that run here."""
        return [consumer.subscription.name for consumer in self._consumers]

    def wait_until_idle(self, stop: threading.Event | None = None) -> None:
        """Return when no subscriber has anything left to do, or ``stop`` is set."""
        stop = stop or threading.Event()
        while not stop.wait(IDLE_TICK):
            if all(consumer.is_idle() for consumer in self._consumers):
                return

    # --- the handler threads

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="natspubsub-handler", daemon=True)
        self._threads = {old for old in self._threads if old.is_alive()} | {thread}
        thread.start()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            outcome = self._run(job)
            self._log(job, outcome)
            if job.expired:
                break  # a fresh thread took this one's place when the time limit ran out

    def _run(self, job: Job) -> Outcome:
        processor = job.consumer.processor
        if processor.is_over_limit(job.delivery):
            with self._gate.alone():
                return job.consumer.run(job, processor.process_alone)
        with self._gate.together():
            return job.consumer.run(job, processor.process)

    def _log(self, job: Job, outcome: Outcome) -> None:
        level = logging.INFO if outcome.result in ("handled", "skipped") else logging.WARNING
        _log.log(
            level,
            "%s %s %s #%d %.1f ms %s%s",
            outcome.topic,
            outcome.event_id[-8:],
            job.consumer.subscription.name,
            outcome.attempt,
            outcome.seconds * 1000,
            outcome.result,
            f": {outcome.detail}" if outcome.detail else "",
            extra={"event_id": outcome.event_id, "result": outcome.result},
        )

    def _run_async(self, awaitable: Any, timeout: float) -> Any:
        """Run an async handler on the loop of the async handlers, in this thread's context."""
        try:
            return self._handler_loop().call(_as_coroutine(awaitable), timeout)
        except TimeoutError:
            raise HandlerTimeout(f"The handler ran longer than {timeout:g} s.") from None

    def _handler_loop(self) -> BackgroundLoop:
        with self._life:
            if self._async is None:
                self._async = BackgroundLoop("natspubsub-handlers")
            return self._async

    def _hand_back_queued(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._queue.get_nowait()
                if job is not None:
                    job.consumer.hand_back(job)

    # --- the monitor

    def _watch(self) -> None:
        waits = [consumer.subscription.ack_wait for consumer in self._consumers]
        tick = min([TICK, *(wait / 6 for wait in waits)])
        while self._state != "stopped":
            self._beat = time.monotonic()
            for consumer in self._consumers:
                for job in consumer.look_after(self._beat):
                    self._expire(job)
            self._wake_monitor.wait(tick)

    def _expire(self, job: Job) -> None:
        _log.error(
            "%s: the handler has been running for more than %g s; its message is handed back "
            "and a new thread takes over",
            job.consumer.subscription.name,
            job.consumer.subscription.timeout,
        )
        self._start_thread()
        # Storing a dead letter may take a while; the monitor has others to renew.
        threading.Thread(
            target=job.consumer.processor.time_out, args=(job.delivery,), daemon=True
        ).start()


async def _as_coroutine(awaitable: Any) -> Any:
    return await awaitable


def choose(subscriptions: Sequence[Subscription], only: Sequence[str] | None) -> list[Subscription]:
    """Pick the subscriptions named in ``only``; all of them if that is None or empty.

    :raises RegistrationError: a name that no subscriber has.
    """
    if not only:
        return list(subscriptions)
    names = {subscription.name for subscription in subscriptions}
    for name in only:
        if name not in names:
            raise RegistrationError(
                f"There is no subscriber {name!r}.", f"Known: {', '.join(sorted(names)) or 'none'}."
            )
    return [subscription for subscription in subscriptions if subscription.name in only]
