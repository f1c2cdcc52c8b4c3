"""The worker: handler threads, a monitor, and an orderly end."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol, Self, cast

from ..brokers.base import Broker
from ..config.settings import Settings
from ..deadletters.box import DeadLetterBox
from ..errors import NatsPubsubError, TablesMissing
from ..signals import worker_started, worker_stopped
from ..subscribing.durables import complaints
from ..subscribing.subscription import Subscription
from ..text import get_logger
from .async_handlers import AsyncHandlers
from .consumer import HAND_BYTES, LEAST_BYTES, STOP_TIMEOUT, Gate, Job, SubscriberConsumer
from .processor import Emit, Processor, Transactions

_log = get_logger("flask_natspubsub.worker")

TICK = 0.25
IDLE_TICK = 0.2
#: For so many seconds an outage is waited for by those who wait for the end of the work.
IDLE_PATIENCE = 10.0
#: For so many seconds a thread goes on with one subscriber's messages before others have a turn.
TURN = 0.01


class Relaying(Protocol):
    """The relay of the outbox, as the worker sees it; see ``publishing.relay.Relay``."""

    def run(self) -> None:
        """Relay until ``stop``."""

    def stop(self) -> None:
        """Have ``run`` return soon."""

    def is_idle(self) -> bool:
        """Whether there is nothing to relay now."""

    @property
    def is_alive(self) -> bool:
        """Whether ``run`` goes round."""


class Worker:
    """Runs subscribers in threads of this process.

    Use it as a context manager, or ``start`` and ``stop`` it.

    :param subscriptions: what to run.
    :param app_context: makes a fresh application context for each message.
    :param emit: sends a signal for the application.
    :param concurrency: handler threads, shared by all subscribers.
    :param transactions: opens the transactions of handlers; None without a database.
    :param relay: relays the outbox in a thread of its own.
    :param declared: all subscribers of the app, to know its consumers that none of them has.
    """

    def __init__(
        self,
        broker: Broker,
        settings: Settings,
        subscriptions: Sequence[Subscription],
        app_context: Callable[[], AbstractContextManager[object]],
        emit: Emit,
        concurrency: int | None = None,
        transactions: Transactions | None = None,
        relay: Relaying | None = None,
        declared: Sequence[Subscription] | None = None,
    ) -> None:
        self.settings = settings
        self._declared = subscriptions if declared is None else declared
        self.concurrency = concurrency or settings.concurrency
        self._broker = broker
        self._emit = emit
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._gate = Gate()
        self._threads: set[threading.Thread] = set()
        self._overdue: dict[threading.Thread, float] = {}
        self._monitor: threading.Thread | None = None
        self._wake_monitor = threading.Event()
        self._async = AsyncHandlers()
        self._relay = relay
        self._relay_thread: threading.Thread | None = None
        self._state = "new"
        self._beat = 0.0
        self._life = threading.Lock()
        box = DeadLetterBox(broker, settings)
        hand_bytes = max(LEAST_BYTES, HAND_BYTES // (len(subscriptions) or 1))
        self._consumers = [
            SubscriberConsumer(
                broker,
                Processor(subscription, box, app_context, emit, self._async.run, transactions),
                settings.stream,
                self.concurrency,
                settings.prefetch,
                self._queue.put,
                self._gate,
                hand_bytes,
            )
            for subscription in subscriptions
        ]

    # --- life

    def start(self, stop: threading.Event | None = None) -> Self:
        """Start the threads and begin to pull.

        While the server is down this takes a moment for each subscriber.

        :param stop: when it is set, those that have not begun to pull do not begin.
        :raises TopologyError: a stream is missing or does not cover a subscriber's subjects.
        :raises BrokerError: the server does not answer, or refuses. After an error what was
            started is stopped again.
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
        if self._relay is not None:
            self._relay_thread = threading.Thread(
                target=self._relay.run, name="natspubsub-relay", daemon=True
            )
            self._relay_thread.start()
        try:
            self._look_at_consumers()
            for consumer in self._consumers:
                if self._state != "running" or (stop is not None and stop.is_set()):
                    break
                consumer.start()
        except BaseException:
            self.stop()
            raise
        self._emit(worker_started, worker=self)
        return self

    def _look_at_consumers(self) -> None:
        """Warn of subscribers that look renamed or removed, before a new one begins."""
        if not self._consumers:
            return
        try:
            self._broker.connect(self.settings.connect_timeout)
            for line in complaints(self._broker, self.settings, self._declared):
                _log.warning("%s", line)
        except NatsPubsubError as error:
            _log.debug("the consumers of the app could not be listed: %s", error)

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
            consumer.halt()
        for consumer in self._consumers:
            consumer.stop_pulling(min(STOP_TIMEOUT, max(0.1, deadline - time.monotonic())))
        self._queue.put(None)
        clean = self._wait_for_handlers(deadline)
        if not clean:
            _log.warning("handlers are still running; their messages will be delivered again")
        self._state = "stopped"
        self._wake_monitor.set()
        if self._monitor is not None and self._monitor is not threading.current_thread():
            self._monitor.join(5)
        self._async.stop()
        self._stop_relay(max(1.0, deadline - time.monotonic()))
        self._emit(worker_stopped, worker=self)
        return clean

    def _wait_for_handlers(self, deadline: float) -> bool:
        """Wait for the threads, but for the caller's own and those whose time runs out."""
        while waiting := [thread for thread in list(self._threads) if self._is_busy(thread)]:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            waiting[0].join(min(left, TICK))
        return True

    def _is_busy(self, thread: threading.Thread) -> bool:
        return thread.is_alive() and thread is not threading.current_thread()

    def hand_back_all(self) -> None:
        """Have everything in hand delivered again now, also what is being handled.

        For the end of a process that will not wait for its handlers.
        """
        for consumer in self._consumers:
            consumer.abandon()

    def __enter__(self) -> Self:
        return self.start() if self._state == "new" else self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def is_healthy(self) -> bool:
        """Whether the threads run, the broker is connected and every pull is alive."""
        return all(self.checks().values())

    def checks(self) -> dict[str, bool]:
        """Say of each thing that a healthy worker needs, by name, whether it is well."""
        found = {
            "running": self._state == "running" and self._is_watched(),
            "nats": self._broker.is_connected,
        }
        if self._relay is not None:
            found["relay"] = self._relay.is_alive
        for consumer in self._consumers:
            found[f"subscriber {consumer.subscription.name}"] = consumer.is_healthy
        return found

    def load(self) -> dict[str, int]:
        """Return how many messages are in hand, and the limit, for health."""
        return {
            "messages_in_hand": sum(consumer.in_hand for consumer in self._consumers),
            "messages_in_hand_limit": sum(consumer.most_in_hand for consumer in self._consumers),
        }

    @property
    def loops(self) -> list[str]:
        """The names that ``nudge`` gets to see if all is well."""
        relay = [] if self._relay is None else ["relay"]
        names = [f"subscriber {consumer.subscription.name}" for consumer in self._consumers]
        return ["monitor", "handler threads", "async handlers", *relay, *names]

    def nudge(self, saw: Callable[[str], None]) -> None:
        """Have ``saw`` called with the name of each loop that goes round, by some in their thread.

        The name of one that hangs, or whose thread has ended, does not come. Does not wait.
        """
        running = self._state == "running"
        if not running or self._is_watched():
            saw("monitor")
        alive = [thread for thread in list(self._threads) if thread.is_alive()]
        if not running or len(alive) >= self.concurrency:
            saw("handler threads")
        if self._relay is not None and (not running or self._relay.is_alive):
            saw("relay")
        self._async.nudge(lambda: saw("async handlers"))
        for consumer in self._consumers:
            consumer.nudge(lambda name=f"subscriber {consumer.subscription.name}": saw(name))  # type: ignore[misc]

    @property
    def overdue(self) -> float:
        """For how many seconds a handler has been running beyond its time limit; 0 if none is."""
        since = [since for one, since in self._overdue.copy().items() if one.is_alive()]
        return time.monotonic() - min(since) if since else 0.0

    def _is_watched(self) -> bool:
        return time.monotonic() - self._beat < 20 * TICK

    @property
    def subscribers(self) -> list[str]:
        """The names of the subscribers that run here."""
        return [consumer.subscription.name for consumer in self._consumers]

    @property
    def relays(self) -> bool:
        """Whether it relays the outbox too."""
        return self._relay is not None

    def wait_until_idle(self, stop: threading.Event | None = None) -> None:
        """Return when no subscriber has anything left to do, or ``stop`` is set.

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

    def _stop_relay(self, timeout: float) -> None:
        """Stop it last: the handlers that have just ended may have written to the outbox."""
        if self._relay is not None and self._relay_thread is not None:
            self._relay.stop()
            self._relay_thread.join(timeout)

    def _is_idle(self) -> bool:
        """Look at all subscribers, and whether one handled something meanwhile.

        That may have been a message for one that was looked at before.
        """
        handled = [consumer.handled for consumer in self._consumers]
        idle = self._relay is None or self._relay.is_idle()
        idle = idle and all(consumer.is_idle() for consumer in self._consumers)
        return idle and handled == [consumer.handled for consumer in self._consumers]

    # --- the handler threads

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
            self._wake_monitor.wait(min([TICK, *waits]))

    def _look_after_all(self) -> None:
        now = time.monotonic()
        for consumer in self._consumers:
            for job in consumer.look_after(now):
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
