"""Runs ``async def`` handlers in an event loop of their own, in a thread of its own.

All of them share the loop, so a handler that does not await blocks the others. The time limit of
a handler therefore runs only while the loop turns, or while this handler blocks it. When a
blocking handler's time is up, the loop is given up: calls that had not begun there begin on
another one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from ..brokers.loop import BackgroundLoop
from ..errors import HandlerInterrupted, HandlerTimeout
from ..text import get_logger

_log = get_logger("flask_natspubsub.worker")

#: Seconds between two beats of the loop, and between two looks of the threads that wait.
BEAT = 0.25
#: Seconds without a turn after which a loop counts as blocked by what it runs.
BLOCKED = 2 * BEAT

_call: contextvars.ContextVar[_Call] = contextvars.ContextVar("natspubsub_call")


class _Call:
    """An awaitable that a thread waits for."""

    def __init__(self, awaitable: Awaitable[Any], timeout: float) -> None:
        self.awaitable = awaitable
        self.timeout = timeout
        self.future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.task: asyncio.Task[Any] | None = None
        #: When it was given to its loop (monotonic), and when it began there (the loop's clock).
        self.given = time.monotonic()
        self.began: float | None = None


class _Loop(BackgroundLoop):
    """A loop with a clock that stands still while the loop does not turn."""

    def __init__(self) -> None:
        self.is_given_up = False
        #: The call that has blocked it, if that is known.
        self.blamed: _Call | None = None
        #: The clock: seconds for which it has turned.
        self._turned = 0.0
        #: The call last seen to block it.
        self._culprit: _Call | None = None
        self._seen = time.monotonic()
        self._beats = False
        self._lock = threading.Lock()
        self._calls: set[_Call] = set()
        #: The call that has started each task, also through other tasks.
        self._owners: weakref.WeakKeyDictionary[Any, _Call] = weakref.WeakKeyDictionary()
        super().__init__("natspubsub-handlers")
        self.loop.set_task_factory(self._make_task)  # type: ignore[arg-type]  # typeshed wants a generic

    # --- any thread

    def begin(self, call: _Call) -> None:
        """Run a call in the context variables of the caller."""
        call.given = time.monotonic()
        with contextlib.suppress(RuntimeError):  # closed: the waiting thread sees that
            self.loop.call_soon_threadsafe(self._begin, call)

    def cancel(self, call: _Call) -> None:
        """Cancel a running call as soon as the loop turns."""
        if call.task is not None:
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(call.task.cancel)

    @property
    def lag(self) -> float:
        """Seconds for which it has not turned, though it has something to run."""
        return time.monotonic() - self._seen if self._calls else 0.0

    @property
    def is_usable(self) -> bool:
        """Whether a call that is given to it will run."""
        return self.is_alive and not self.is_given_up

    def elapsed(self, call: _Call, blocker: _Call | None) -> float:
        """Return for how many seconds ``call`` has been running; 0 if it has not begun.

        :param blocker: the call that blocks the loop; only its time goes on.
        """
        if call.began is None:
            return 0.0
        lag = self.lag
        is_running = lag < BLOCKED or blocker is None or call is blocker
        return self._turned - call.began + (lag if is_running else BLOCKED)

    def has_no_turn_for(self, call: _Call) -> bool:
        """Whether it has not turned for as long as ``call`` may run."""
        waits = time.monotonic() - call.given if call.began is None else self.lag
        return waits > max(call.timeout, BLOCKED)

    def blocker(self) -> _Call | None:
        """Return the call that blocks the loop; None if none does, or it is not known."""
        if self.lag < BLOCKED:
            return None
        task = asyncio.current_task(self.loop)
        self._culprit = self._owners.get(task) if task is not None else None
        return self._culprit

    def give_up(self, blamed: _Call | None) -> bool:
        """Begin no more calls here; False if another thread has given it up already."""
        with self._lock:
            if self.is_given_up:
                return False
            self.is_given_up, self.blamed = True, blamed
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.loop.stop)  # once it turns, it cancels the rest
        return True

    # --- the loop's thread

    def _begin(self, call: _Call) -> None:
        with self._lock:
            if self.is_given_up:
                return
            self._beat()
            call.began = self._turned
        self._calls.add(call)
        _call.set(call)  # in the context of this callback, which the task inherits
        call.task = self.loop.create_task(_outcome(call.awaitable))
        call.task.add_done_callback(lambda task: self._end(call, task))
        if not self._beats:
            self._beats = True
            self._keep_beating()

    def _end(self, call: _Call, task: asyncio.Task[Any]) -> None:
        self._calls.discard(call)
        self._beat()
        if task.cancelled():
            call.future.set_exception(asyncio.CancelledError())
            return
        result, error = task.result()
        if error is None:
            call.future.set_result(result)
        else:
            call.future.set_exception(error)

    def _keep_beating(self) -> None:
        self._beat()
        self._beats = bool(self._calls)
        if self._beats:
            self.loop.call_later(BEAT, self._keep_beating)

    def _beat(self) -> None:
        now = time.monotonic()
        gap, self._seen = now - self._seen, now
        if self._calls:
            self._turned += min(gap, BLOCKED)
        culprit, self._culprit = self._culprit, None
        if culprit is not None and culprit.began is not None and gap > BLOCKED:
            culprit.began -= gap - BLOCKED  # the standstill counts as its own time

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **options)
        owner = _call.get(None)
        if owner is not None:
            self._owners[task] = owner
        return task


async def _outcome(awaitable: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Await; an error is returned, since sys.exit() in a task would end the loop."""
    try:
        return await awaitable, None
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001 - for who waits
        return None, error


class AsyncHandlers:
    """Runs awaitables for the threads that handle messages; the loop is made at first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: _Loop | None = None

    def run(self, awaitable: Awaitable[Any], timeout: float) -> Any:
        """Run ``awaitable`` in the context variables of the caller, and wait for its result.

        :raises HandlerTimeout: it ran longer than ``timeout`` seconds, and was cancelled.
        :raises HandlerInterrupted: the loop was given up because another handler blocked it.
        """
        call = _Call(awaitable, timeout)
        loop = self._live_loop()
        loop.begin(call)
        while True:
            try:
                return call.future.result(min(timeout, BEAT))
            except TimeoutError:
                if call.future.done():
                    return call.future.result()  # the handler's own TimeoutError, or a result
            self._look_at(loop, call)
            if not loop.is_usable:
                loop = self._live_loop()  # it has not begun there
                loop.begin(call)

    def _look_at(self, loop: _Loop, call: _Call) -> None:
        """Check the time limits of ``call`` and of the call that blocks the loop."""
        blocker = loop.blocker()
        if blocker is not None and loop.elapsed(blocker, blocker) > blocker.timeout:
            self._give_up(loop, blocker)
        elif blocker is None and loop.has_no_turn_for(call):
            self._give_up(loop, None)
        elif loop.elapsed(call, blocker) > call.timeout:
            loop.cancel(call)
            raise _too_long(call)
        if loop.is_usable or call.began is None:
            return
        if loop.blamed is call or loop.elapsed(call, loop.blamed) > call.timeout:
            raise _too_long(call)
        raise HandlerInterrupted("The event loop was given up: another async handler blocked it.")

    def _give_up(self, loop: _Loop, blocker: _Call | None) -> None:
        with self._lock:
            if self._loop is loop:
                self._loop = None
        if loop.give_up(blocker):
            name = getattr(blocker and blocker.awaitable, "__qualname__", "a callback")
            _log.error(
                "%s has blocked the event loop of the async handlers for %.1f s: something in it "
                "does not await, time.sleep() or a driver that is not async. The others go on in "
                "a new loop",
                name,
                loop.lag,
            )

    def ping(self, saw: Callable[[], None]) -> None:
        """Call ``saw`` in the loop, or at once if there is none; never if the loop hangs."""
        loop = self._loop
        if loop is None:
            saw()
        else:
            with contextlib.suppress(RuntimeError):  # it is closed: the worker has just stopped
                loop.loop.call_soon_threadsafe(saw)

    def stop(self) -> None:
        """Cancel the running calls, and end the thread."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            loop.stop()

    def _live_loop(self) -> _Loop:
        with self._lock:
            if self._loop is None or not self._loop.is_usable:
                self._loop = _Loop()
            return self._loop


def _too_long(call: _Call) -> HandlerTimeout:
    return HandlerTimeout(f"The handler ran longer than {call.timeout:g} s.")
