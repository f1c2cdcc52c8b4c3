"""Runs the callbacks of the broker in memory, one at a time, and its timer thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from ...signals import call_guarded

Callback = Callable[[Any], None]


class HandOver:
    """Makes calls in order and one at a time, in the thread that is first to call ``run``.

    Calls do not nest: if a call queues more calls, the current ``run`` makes them.

    :param lock: the broker's; held by the caller of every method but ``run``.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._calls: deque[tuple[object, Callback, Any]] = deque()
        self._runner: int | None = None
        self._receiver: object = None
        self._returned = threading.Condition(lock)

    def add(self, receiver: object, callback: Callback, argument: Any) -> None:
        """Queue a call for the next ``run``."""
        self._calls.append((receiver, callback, argument))

    def withdraw(self, receiver: object) -> list[Any]:
        """Remove the queued calls of ``receiver``, and return their arguments."""
        mine = [argument for owner, _, argument in self._calls if owner is receiver]
        self._calls = deque(call for call in self._calls if call[0] is not receiver)
        return mine

    def wait_for(self, receiver: object, timeout: float) -> None:
        """Wait, with the lock released, until no call of ``receiver`` is running."""
        if self._runner != threading.get_ident():
            self._returned.wait_for(lambda: self._receiver is not receiver, timeout)

    def run(self) -> None:
        """Make the queued calls, unless a thread (this one or another) already does."""
        me = threading.get_ident()
        with self._lock:
            if self._runner is not None:
                return
            self._runner = me
        try:
            while (call := self._next()) is not None:
                call_guarded("a callback of the broker in memory", *call)
        finally:
            with self._lock:
                if self._runner == me:
                    self._release()

    def _next(self) -> tuple[Callback, Any] | None:
        with self._lock:
            if not self._calls:
                self._release()
                return None
            self._receiver, callback, argument = self._calls.popleft()
            self._returned.notify_all()
            return callback, argument

    def _release(self) -> None:
        self._runner = self._receiver = None
        self._returned.notify_all()


class Alarm:
    """Calls ``ring`` in its own daemon thread, which exists only while an alarm is set.

    :param lock: the broker's; held by the caller of ``set`` and ``cancel``, not in ``ring``.
    """

    def __init__(
        self, lock: threading.Lock, now: Callable[[], float], ring: Callable[[], None]
    ) -> None:
        self._lock = lock
        self._now = now
        self._ring = ring
        self._at: float | None = None
        self._changed = threading.Condition(lock)
        self._thread: threading.Thread | None = None

    def set(self, at: float) -> None:
        """Call ``ring`` at the time ``at``; an earlier alarm stays."""
        if self._at is None or at < self._at:
            self._at = at
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="natspubsub-memory-broker", daemon=True
            )
            self._thread.start()

    def cancel(self) -> threading.Thread | None:
        """End the thread, and return it, if there is one, for the caller to join."""
        self._at = None
        self._changed.notify()
        return self._thread

    def _run(self) -> None:
        while self._wait():
            self._ring()

    def _wait(self) -> bool:
        with self._lock:
            while self._at is not None:
                left = self._at - self._now()
                if left <= 0:
                    self._at = None
                    return True
                self._changed.wait(left)
            self._thread = None
            return False
