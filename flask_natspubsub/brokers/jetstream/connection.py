"""The interface of one NATS connection, as ``Link`` uses it, and of whoever owns the link."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from ...config.settings import Settings
from ..wire import Route

T = TypeVar("T")


class ConnectionRefused(Exception):
    """The server answered and does not want us: trying again soon cannot help."""


class ConnectionLost(OSError):
    """The connection was lost while something was awaited of it."""


class Connection(Protocol):
    """One connection, up until ``closed`` is set.

    Its coroutines but ``close`` may never end: they are awaited by ``within``.
    """

    closed: asyncio.Event

    @property
    def version(self) -> str:
        """The server's version."""

    @property
    def max_payload(self) -> int:
        """The number of bytes of payload and headers that the server takes."""

    @property
    def unsent(self) -> int:
        """The number of bytes that were written and that the socket has not taken yet."""

    @property
    def servers(self) -> Sequence[str]:
        """The URLs of further servers of the cluster."""

    @property
    def cluster_size(self) -> int:
        """The number of servers of the cluster that take clients."""

    def send(self, frames: Sequence[bytes]) -> None:
        """Write frames of messages."""

    async def subscribe(self, subject: str, route: Route) -> int:
        """Subscribe; returns a handle once the server has processed it."""

    async def unsubscribe(self, handle: int, *, flush: bool) -> None:
        """Unsubscribe; with ``flush``, messages on their way still arrive."""

    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        """Send a request and return its reply.

        :raises TimeoutError: none came.
        :raises LookupError: nobody listens.
        """

    async def flush(self) -> None:
        """Wait until the server has read all that was sent."""

    async def close(self) -> None:
        """Close at once; this one has a deadline of its own."""


class LinkOwner:
    """Told about the connection, on the loop's thread; these methods do nothing."""

    async def set_up(self) -> None:
        """Prepare the server before the link counts as up, and when its streams need mending."""

    def on_up(self) -> None:
        """Start to use a new connection."""

    def on_down(self) -> None:
        """Note that there is no connection, or that the server has refused one."""

    def on_denied(self, subject: str) -> None:
        """Note that this user may not publish to ``subject``; lower case, or empty if unknown."""


Dial = Callable[[Settings, str, Callable[[str, str], None]], Coroutine[Any, Any, Connection]]


async def within(
    seconds: float, work: Coroutine[Any, Any, T], lost: asyncio.Event | None = None
) -> T:
    """Await ``work``, but not longer than ``seconds``, nor beyond the moment ``lost`` is set.

    ``work`` is cancelled then and not waited for: nats-py swallows cancellations in places.

    :raises TimeoutError: the time is up.
    :raises ConnectionLost: ``lost`` is set.
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(_retrieve)
    ends: list[asyncio.Future[Any]] = [task]
    if lost is not None:
        ends.append(asyncio.ensure_future(lost.wait()))
    try:
        await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if lost is not None and lost.is_set():
            raise ConnectionLost("the connection was lost")
        raise TimeoutError("it does not answer")
    finally:
        for end in ends:
            end.cancel()


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Take the error of a task that may have been given up: asyncio would log it as unseen."""
    if not task.cancelled():
        task.exception()
