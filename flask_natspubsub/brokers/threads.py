"""The thread behind a broker: a real one, also where gevent has replaced Python's threads.

Under gevent's patches a ``threading.Thread`` is a greenlet. An asyncio loop in it would run in
the thread of the requests: the worker could hang, and no async view could start a loop of its
own. So the thread is taken from below the patches. Locks and futures that are patched may be
used from several real threads; a greenlet that waits for one lets the others run.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from ..errors import ConfigurationError

JOIN_POLL = 0.005


class LoopThread(Protocol):
    """What a background loop needs of its thread."""

    def is_alive(self) -> bool:
        """Whether it runs in this process."""

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""


class _ThreadBelowGevent:
    """A thread of the system, started past gevent's patches; it never keeps Python from ending."""

    def __init__(self, target: Callable[[], None]) -> None:
        self._target = target
        self._pid = os.getpid()
        self._has_ended = False
        _original("_thread", "start_new_thread")(self._run, ())

    def _run(self) -> None:
        try:
            self._target()
        finally:
            self._has_ended = True

    def is_alive(self) -> bool:
        return not self._has_ended and self._pid == os.getpid()

    def join(self, timeout: float | None = None) -> None:
        deadline = time.monotonic() + (timeout or 0.0)
        while self.is_alive() and (timeout is None or time.monotonic() < deadline):
            time.sleep(JOIN_POLL)


def start_thread(target: Callable[[], None], name: str) -> LoopThread:
    """Start a daemon thread that runs ``target``.

    :raises ConfigurationError: eventlet has replaced Python's threads.
    """
    refuse_eventlet()
    if is_patched_by_gevent():
        return _ThreadBelowGevent(target)
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


def ident_of_system_thread() -> Callable[[], int]:
    """Return the function that tells which thread of the system its caller runs in."""
    if is_patched_by_gevent():
        get_ident: Callable[[], int] = _original("_thread", "get_ident")
        return get_ident
    return threading.get_ident


def is_patched_by_gevent() -> bool:
    """Whether threads are greenlets of gevent."""
    monkey: Any = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def _original(module: str, name: str) -> Any:
    """Return what gevent has replaced; to be called where it has."""
    return sys.modules["gevent.monkey"].get_original(module, name)


def refuse_eventlet() -> None:
    """Raise ConfigurationError if threads are greenlets of eventlet."""
    patcher: Any = sys.modules.get("eventlet.patcher")
    if patcher is not None and patcher.is_monkey_patched("thread"):
        raise ConfigurationError(
            "eventlet has replaced Python's threads; a connection to NATS cannot work under it.",
            "Use a threaded or a gevent worker, such as gunicorn's gthread or gevent.",
        )


def new_loop_below_gevent() -> asyncio.AbstractEventLoop:
    """Make a loop whose selector and name look-ups are Python's own, not gevent's."""
    look_up: Callable[..., Any] = _original("socket", "getaddrinfo")

    class Loop(asyncio.SelectorEventLoop):
        async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
            # Without an executor, whose threads would be greenlets that never get a turn.
            return look_up(host, port, **options)

    return Loop(_original("selectors", "DefaultSelector")())
