"""Answers for coroutines: brought from the broker's thread into the event loop that waits.

To wake a loop costs more than a message does. So what is answered while a loop has been woken
and has not looked yet is found by that look.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable

from .draft import PublishReceipt

#: Takes the receipt, or the error.
Done = Callable[[PublishReceipt | Exception], None]


async def answer_to(start: Callable[[Done], None]) -> PublishReceipt:
    """Call ``start`` with what takes the answer, and wait for that; any thread may bring it."""
    mail = _mail_of(asyncio.get_running_loop())
    future: asyncio.Future[PublishReceipt] = mail.loop.create_future()
    start(lambda result: mail.put(future, result))
    return await future


class _Mail:
    """What has been answered for one event loop and not been handed out."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._arrived: deque[tuple[asyncio.Future[PublishReceipt], PublishReceipt | Exception]]
        self._arrived = deque()
        self._called = False

    def put(
        self, future: asyncio.Future[PublishReceipt], result: PublishReceipt | Exception
    ) -> None:
        """Bring an answer; any thread."""
        self._arrived.append((future, result))
        if not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._called = False  # before the look: what is put after it calls again
        while self._arrived:
            future, result = self._arrived.popleft()
            if future.done():
                continue  # whoever waited was cancelled
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


class _Local(threading.local):
    mail: _Mail | None = None


_local = _Local()


def _mail_of(loop: asyncio.AbstractEventLoop) -> _Mail:
    """Return the mail of the loop that runs in this thread."""
    mail = _local.mail
    if mail is None or mail.loop is not loop:
        mail = _local.mail = _Mail(loop)
    return mail
