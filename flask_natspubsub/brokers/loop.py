"""One background thread with one asyncio loop, made on first use and anew after a fork."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Coroutine
from typing import Any, TypeVar

from ..text import get_logger
from .threads import (
    ident_of_system_thread,
    is_patched_by_gevent,
    new_loop_below_gevent,
    refuse_eventlet,
    start_thread,
)

_log = get_logger("flask_natspubsub.broker")

T = TypeVar("T")


def _new_loop() -> asyncio.AbstractEventLoop:
    """Make a loop: uvloop's, which needs half the time for each message, if it is installed."""
    try:
        import uvloop  # an optional dependency
    except ImportError:
        return new_loop_below_gevent() if is_patched_by_gevent() else asyncio.new_event_loop()
    return uvloop.new_event_loop()


class BackgroundLoop:
    """An asyncio loop in a daemon thread of its own. Not usable after ``stop`` or a fork."""

    def __init__(self, name: str) -> None:
        refuse_eventlet()
        self._name = name
        self._is_stopping = False
        self.loop = _new_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        #: Set when the thread ends; a forked child, which has no such thread, sees it unset.
        self.has_ended = False
        self._get_ident = ident_of_system_thread()
        self._ident = 0
        self._thread = start_thread(self._run, name)

    def _run(self) -> None:
        self._ident = self._get_ident()
        asyncio.set_event_loop(self.loop)
        try:
            while not self._turn():
                pass
        finally:
            self.has_ended = True
            for task in (pending := asyncio.all_tasks(self.loop)):
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def _turn(self) -> bool:
        """Run until ``stop``, or until something in the loop calls sys.exit(): False then."""
        try:
            self.loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            _log.exception("something tried to end the thread %r, which goes on", self._name)
            return self._is_stopping
        return True

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs; ``loop.is_running()`` would lie after a fork."""
        return not self.has_ended and self._thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Whether the caller is the loop's own thread, which must never wait for itself."""
        return self._get_ident() == self._ident

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task and keep it alive; to be called in the loop's thread."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def call(self, coroutine: Coroutine[Any, Any, T], timeout: float) -> T:
        """Run ``coroutine`` on the loop and wait for it; TimeoutError after ``timeout`` seconds."""
        if self.is_current:
            coroutine.close()
            raise RuntimeError("the broker's own thread cannot wait for the broker")
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError from None

    def stop(self, timeout: float = 2.0) -> None:
        """Cancel all tasks and end the thread."""
        self._is_stopping = True
        if self.is_alive:
            self.loop.call_soon_threadsafe(self.loop.stop)
        if not self.is_current:
            self._thread.join(timeout)
