"""A worker as a process: signals end it, in order or at once."""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it brings asyncio, which most commands do without
    from .runner import Worker

_log = logging.getLogger("flask_natspubsub.worker")

CLOSE_TIMEOUT = 5.0
#: Longest a second signal waits for messages to be handed back.
LAST_WORDS = 1.0


class WorkerProcess:
    """Runs a worker until a signal ends it.

    The worker lives in a thread and the main thread only waits for signals, so that a second
    one is obeyed whatever the first one's orderly end is waiting for.

    :param close: sends what is buffered and closes the broker, in so many seconds.
    :param burst: end when there is nothing left to do.
    """

    def __init__(
        self, worker: Worker, close: Callable[[float], None], *, burst: bool = False
    ) -> None:
        self._worker = worker
        self._close = close
        self._burst = burst
        self._stop = threading.Event()
        self._news: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._clean = False
        self._error: BaseException | None = None

    def run(self) -> int:
        """Run to the end; call it in the main thread.

        :returns: the exit code: 0, or 1 if handlers were still running after
            NATSPUBSUB_SHUTDOWN_TIMEOUT. They are abandoned and their messages handed back.
        :raises TopologyError: see ``Worker.start``.
        """
        with caught_signals(self._news.put):
            threading.Thread(target=self._live, name="natspubsub-worker", daemon=True).start()
            while (number := self._news.get()) is not None:
                self._on_signal(number)
        if self._error is not None:
            raise self._error
        return 0 if self._clean else 1

    def _live(self) -> None:
        try:
            try:
                self._worker.start(self._stop)
                _log.info("started")
                if self._burst:
                    self._worker.wait_until_idle(self._stop)
                else:
                    self._stop.wait()
                self._clean = self._worker.stop()
                self._worker.hand_back_all()
            finally:
                self._close(CLOSE_TIMEOUT)
            _log.info("stopped")
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            self._error = error
        finally:
            self._news.put(None)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._stop.is_set():
            _log.warning("%s again: ending at once", name)
            self._leave()
        _log.info("%s: finishing what has begun; once more ends at once", name)
        self._stop.set()

    def _leave(self) -> None:
        """End the process without waiting for anybody; what is in hand is handed back."""
        last_words = threading.Thread(target=self._hand_back, daemon=True)
        last_words.start()
        last_words.join(LAST_WORDS)
        sys.stderr.flush()
        os._exit(1)

    def _hand_back(self) -> None:
        self._worker.hand_back_all()
        self._close(LAST_WORDS)


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
