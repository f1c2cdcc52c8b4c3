"""Passes results from the broker's thread to coroutines on other event loops.

Waking an event loop costs more than publishing a message. Therefore all results that arrive
between the wake-up of a loop and its run are passed on by this one run.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable

from .draft import PublishReceipt

#: Is called with the receipt or the error.
Done = Callable[[PublishReceipt | Exception], None]


async def answer_to(start: Callable[[Done], None]) -> PublishReceipt:
    """Call ``start`` with a callback, and wait for its result; any thread may call it."""
    mailbox = _mailbox_of(asyncio.get_running_loop())
    future: asyncio.Future[PublishReceipt] = mailbox.loop.create_future()
    start(lambda result: mailbox.put(future, result))
    return await future


class _Mailbox:
    """Results for coroutines of one event loop that were not passed on yet."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._arrived: deque[tuple[asyncio.Future[PublishReceipt], PublishReceipt | Exception]]
        self._arrived = deque()
        self._called = False

    def put(
        self, future: asyncio.Future[PublishReceipt], result: PublishReceipt | Exception
    ) -> None:
        """Add the result of ``future``; may be called in any thread."""
        self._arrived.append((future, result))
        if not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
                self.loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._called = False  # first, so that a later put schedules another run
        while self._arrived:
            future, result = self._arrived.popleft()
            if future.done():
                continue  # the waiting coroutine was cancelled
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


class _Local(threading.local):
    mailbox: _Mailbox | None = None


_local = _Local()


def _mailbox_of(loop: asyncio.AbstractEventLoop) -> _Mailbox:
    """Return the mailbox of the loop that runs in this thread."""
    mailbox = _local.mailbox
    if mailbox is None or mailbox.loop is not loop:
        mailbox = _local.mailbox = _Mailbox(loop)
    return mailbox
