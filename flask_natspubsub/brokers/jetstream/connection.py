"""What ``Link`` needs of one connection, and whoever makes one has to keep to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from ...config.settings import Settings
from ..wire import Route


class ConnectionRefused(Exception):
    """The server answered and does not want us: trying again soon cannot help."""


class Connection(Protocol):
    """One connection, up until ``closed`` is set."""

    closed: asyncio.Event

    @property
    def version(self) -> str:
        """The server's version."""

    @property
    def max_payload(self) -> int:
        """Return how many bytes of payload and headers the server takes."""

    @property
    def unsent(self) -> int:
        """Return how many bytes were written that the socket has not taken yet."""

    @property
    def servers(self) -> Sequence[str]:
        """Return the URLs of further servers of the cluster."""

    @property
    def cluster_size(self) -> int:
        """Return how many servers of the cluster take clients."""

    def send(self, frames: Sequence[bytes]) -> None:
        """Write frames of messages."""

    async def subscribe(self, subject: str, route: Route) -> int:
        """Start to listen; returns a handle."""

    async def unsubscribe(self, handle: int, *, flush: bool) -> None:
        """Stop to listen; with ``flush``, what is on its way still arrives."""

    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        """Ask and wait for one answer; TimeoutError, or LookupError when nobody listens."""

    async def flush(self, timeout: float) -> None:
        """Wait until the server has read all that was sent."""

    async def close(self) -> None:
        """Close at once."""


class Listener(Protocol):
    """Told about the connection, on the loop's thread."""

    def on_up(self) -> None:
        """There is a connection."""

    def on_down(self) -> None:
        """There is no connection any more."""


Dial = Callable[[Settings, str, Callable[[str, str], None]], Awaitable[Connection]]
