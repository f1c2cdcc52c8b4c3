"""Where ``async def`` handlers run: an event loop of their own, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from ..brokers.loop import BackgroundLoop
from ..subscribing.processor import HandlerTimeout


class AsyncHandlers:
    """Runs awaitables for the threads that handle messages; the loop is made at first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: BackgroundLoop | None = None

    def run(self, awaitable: Awaitable[Any], timeout: float) -> Any:
        """Run ``awaitable`` in the context variables of the caller, and wait for its result.

        :raises HandlerTimeout: it took longer than ``timeout`` seconds, and was cancelled.
        """
        future = asyncio.run_coroutine_threadsafe(_await(awaitable), self._live_loop())
        try:
            return future.result(timeout)
        except TimeoutError:
            if future.done():
                return future.result()  # the handler's own TimeoutError, or a result at last
            future.cancel()
            raise HandlerTimeout(f"The handler ran longer than {timeout:g} s.") from None

    def nudge(self, saw: Callable[[], None]) -> None:
        """Call ``saw`` in the loop; at once if there is none. Never, if the loop hangs."""
        loop = self._loop
        if loop is None:
            saw()
        else:
            with contextlib.suppress(RuntimeError):  # it is closed: the worker has just stopped
                loop.loop.call_soon_threadsafe(saw)

    def stop(self) -> None:
        """Cancel what runs, and end the thread."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            loop.stop()

    def _live_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = BackgroundLoop("natspubsub-handlers")
            return self._loop.loop


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
