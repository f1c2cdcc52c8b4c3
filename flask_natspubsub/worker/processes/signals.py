"""A process that runs a worker until a signal ends it, gracefully or at once."""

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

if TYPE_CHECKING:  # they bring asyncio and SQLAlchemy, which most commands do not need
    from ...outbox.relay import Relay
    from ..worker import Worker
    from .vitals import Heartbeat

_log = get_logger("flask_natspubsub.worker")

CLOSE_TIMEOUT = 5.0
#: Seconds after a second signal for handing messages back, and for writing the log.
LAST_WORDS = 2.0
LOGGED = 1.0
#: Seconds after which the main thread looks for signals that did not wake it.
LOOK = 0.5
#: Orders of the parent process; signals have numbers above these.
_STOP, _AT_ONCE = 0, -1
FINISHING_BATCH = "finishing the batch in hand"


class SignalledProcess:
    """Runs ``work`` in a thread until a signal ends it.

    The main thread only waits for signals, so that a second one is obeyed whatever the graceful
    end that the first one began is waiting for.

    :param close: called as ``close(timeout)``, with seconds, to send what is buffered and close
        the broker.
    :param lifeline: to the parent that started it. Then only the parent ends it at once: signals
        may come twice, from the parent's manager and from the parent.
    :param patience: seconds that its end may take when the parent is gone.
    """

    #: What it does after the first signal, for the log.
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

        :returns: the exit code: 0, or 1 if it did not end gracefully.
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
        """Wait for the next signal or order; None is the end of the work.

        The system may deliver a second signal to another thread. Python then notes it without
        waking this thread, which is to handle it; so this one wakes by itself every ``LOOK``.
        """
        while True:
            with suppress(queue.Empty):
                return self._news.get(timeout=LOOK)

    def work(self) -> bool:
        """Work until the end, or until ``stop``; returns whether it ended gracefully."""
        raise NotImplementedError

    def stop(self) -> None:
        """Make ``work`` return soon."""
        self._stop.set()

    def hand_back(self) -> None:
        """Hand back what other processes could go on with; for an end without waiting."""

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
        """End the process without waiting for the work; hand back what is in hand."""
        _in_at_most(LAST_WORDS, self._say_last_words)
        _in_at_most(LOGGED, logging.shutdown)  # what log handlers hold back
        os._exit(1)

    def _say_last_words(self) -> None:
        self.hand_back()
        self._close(LAST_WORDS)


class WorkerProcess(SignalledProcess):
    """Runs a worker until a signal ends it.

    Its exit code is 1 if handlers were still running after NATSPUBSUB_SHUTDOWN_TIMEOUT. They
    are abandoned and their messages handed back.

    :param burst: end when there is nothing left to do.
    :param heartbeat: pings the worker's loops while it runs.
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
        if not worker.subscribers:
            self.last_work = FINISHING_BATCH

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
        """Hand back the messages in hand, and the leases."""
        self._worker.hand_back_all()


class RelayOnceProcess(SignalledProcess):
    """Relays until nothing is due, or a signal ends it; the leases are given back in any case."""

    last_work = FINISHING_BATCH

    def __init__(self, relay: Relay, close: Callable[[float], None]) -> None:
        super().__init__(close)
        #: How many rows were sent.
        self.sent = 0
        self._relay = relay

    def work(self) -> bool:
        """Send what is due.

        :raises NatsPubsubError: the database or the connection failed.
        """
        self.sent = self._relay.run_once()
        return True

    def stop(self) -> None:
        """End after the batch in hand."""
        self._relay.stop()

    def hand_back(self) -> None:
        """Give the leases back."""
        self._relay.release()


def _in_at_most(seconds: float, work: Callable[[], None]) -> None:
    """Do ``work`` in a thread, and wait for at most ``seconds`` for its end."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


@contextmanager
def caught_signals(receive: Callable[[int], None]) -> Iterator[None]:
    """Call ``receive(number)`` for SIGTERM, SIGINT and SIGHUP instead of dying of them.

    ``receive`` may interrupt the main thread anywhere, so it must take no lock;
    ``SimpleQueue.put`` takes none.
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
