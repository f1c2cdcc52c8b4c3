"""A worker, or a relay, as a process: signals end it, in order or at once."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from ...text import get_logger
from .child import GRACE, Lifeline

if TYPE_CHECKING:  # they bring asyncio and SQLAlchemy, which most commands do without
    from ...outbox.relay import Relay
    from ..worker import Worker
    from .vitals import Heartbeat

_log = get_logger("flask_natspubsub.worker")

CLOSE_TIMEOUT = 5.0
#: Longest a second signal waits for messages to be handed back.
LAST_WORDS = 2.0
#: Longest it waits for the log; seconds.
LOGGED = 1.0
#: How often the main thread looks for signals that did not wake it; seconds.
LOOK = 0.5
#: What a parent process has said; a signal has a number above these.
_STOP, _AT_ONCE = 0, -1


class Process:
    """Runs something until a signal ends it.

    It lives in a thread and the main thread only waits for signals, so that a second one is
    obeyed whatever the first one's orderly end is waiting for.

    :param close: sends what is buffered and closes the broker, in so many seconds.
    :param lifeline: to the parent that started it. Then only the parent ends it at once: signals
        may come twice, from the parent's manager and from the parent.
    :param patience: how long it may take to end when the parent is gone; seconds.
    """

    #: What the first signal has it do, for the log.
    last_work = "finishing what has begun"

    def __init__(
        self,
        close: Callable[[float], None],
        lifeline: Lifeline | None = None,
        patience: float = 0.0,
    ) -> None:
        self._close = close
        self._lifeline = lifeline
        self._patience = patience
        self._stop = threading.Event()
        self._news: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._clean = False
        self._error: BaseException | None = None

    def run(self) -> int:
        """Run to the end; call it in the main thread.

        :returns: the exit code: 0, or 1 if it did not end in order.
        """
        with caught_signals(self._news.put):
            if self._lifeline is not None:
                self._lifeline.listen(self._on_word, self._patience)
            threading.Thread(target=self._live, name="natspubsub-process", daemon=True).start()
            while (number := self._next_news()) is not None:
                self._on_signal(number)
        if self._error is not None:
            raise self._error
        return 0 if self._clean else 1

    def _next_news(self) -> int | None:
        """Wait for what comes next.

        The system may give a second signal that comes at once to another thread. Python then
        notes it and does not wake this one, which is to handle it: so it wakes by itself.
        """
        while True:
            with suppress(queue.Empty):
                return self._news.get(timeout=LOOK)

    def work(self) -> bool:
        """Work until the end, or until ``stop``; returns whether all ended in order."""
        raise NotImplementedError

    def stop(self) -> None:
        """Have ``work`` return soon."""
        self._stop.set()

    def hand_back(self) -> None:
        """Give back what others could go on with; for an end without waiting."""

    def _live(self) -> None:
        try:
            try:
                self._clean = self.work()
            finally:
                self._close(CLOSE_TIMEOUT)
            _log.info("stopped")
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            self._error = error
        finally:
            self._news.put(None)

    def _on_word(self, at_once: bool) -> None:
        self._news.put(_AT_ONCE if at_once else _STOP)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name if number > 0 else "the parent process"
        if number == _AT_ONCE or (self._stop.is_set() and self._lifeline is None):
            _log.warning("%s again: ending at once", name)
            self._leave()
        if self._stop.is_set():
            return
        hint = "; once more ends at once" if self._lifeline is None else ""
        _log.info("%s: %s%s", name, self.last_work, hint)
        self._stop.set()
        self.stop()

    def _leave(self) -> None:
        """End the process without waiting for anybody; what is in hand is handed back."""
        _in_at_most(LAST_WORDS, self._say_last_words)
        _in_at_most(LOGGED, logging.shutdown)  # what log handlers hold back
        os._exit(1)

    def _say_last_words(self) -> None:
        self.hand_back()
        self._close(LAST_WORDS)


class WorkerProcess(Process):
    """Runs a worker until a signal ends it.

    Its exit code is 1 if handlers were still running after NATSPUBSUB_SHUTDOWN_TIMEOUT. They
    are abandoned and their messages handed back.

    :param burst: end when there is nothing left to do.
    :param heartbeat: looks at the worker while it runs.
    """

    def __init__(
        self,
        worker: Worker,
        close: Callable[[float], None],
        lifeline: Lifeline | None = None,
        *,
        burst: bool = False,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        super().__init__(close, lifeline, worker.settings.shutdown_timeout + GRACE)
        self._worker = worker
        self._burst = burst
        self._heartbeat = heartbeat

    def work(self) -> bool:
        """Start the worker and, in the end, stop it.

        :raises TopologyError: see ``Worker.start``.
        :raises NatsPubsubError: in a burst, see ``Worker.wait_until_idle``.
        """
        if self._heartbeat is not None:
            self._heartbeat.start()
        self._worker.start(self._stop)
        _log.info("started")
        if self._heartbeat is not None:
            self._heartbeat.look_now()
        try:
            if self._burst:
                self._worker.wait_until_idle(self._stop)
            else:
                self._stop.wait()
        finally:
            clean = self._worker.stop()
            self._worker.hand_back_all()
            if self._heartbeat is not None:
                self._heartbeat.stop()
        return clean

    def hand_back(self) -> None:
        """Have the messages in hand delivered again."""
        self._worker.hand_back_all()


class RelayProcess(Process):
    """Runs a relay until a signal ends it, or, with ``once``, until nothing is due.

    Its leases are given back in any case, so that another relay goes on at once.
    """

    last_work = "finishing the batch in hand"

    def __init__(self, relay: Relay, close: Callable[[float], None], *, once: bool = False) -> None:
        super().__init__(close)
        #: How many rows were sent, with ``once``.
        self.sent = 0
        self._relay = relay
        self._once = once

    def work(self) -> bool:
        """Relay.

        :raises NatsPubsubError: with ``once``, if the database or the connection failed.
        """
        if self._once:
            self.sent = self._relay.run_once()
        else:
            _log.info("started")
            self._relay.run()
        return True

    def stop(self) -> None:
        """Have it end after the batch in hand."""
        self._relay.stop()

    def hand_back(self) -> None:
        """Give the leases back."""
        self._relay.release()


def _in_at_most(seconds: float, work: Callable[[], None]) -> None:
    """Do ``work``, and do not wait longer than so for its end."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


@contextmanager
def caught_signals(receive: Callable[[int], None]) -> Iterator[None]:
    """Have ``receive`` called with SIGTERM, SIGINT and SIGHUP instead of dying of them.

    ``receive`` may interrupt the main thread anywhere, so it must take no lock;
    ``SimpleQueue.put`` is made for that.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        receive(number)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # ignored is what nohup asks for
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
