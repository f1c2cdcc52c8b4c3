"""Connections that end, or fall silent, after an exact number of bytes, on the loop of a test."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Self

#: What happens at the cut: an orderly end, a reset, or nothing any more in either direction.
How = Literal["closed", "reset", "silent"]
Direction = Literal["from server", "from client"]


class Cut:
    """Stands before ``port`` and cuts each connection; an async context manager.

    :param direction: whose bytes are counted.
    :param count: the number of them that pass; None to cut nowhere.
    """

    def __init__(
        self, port: int, direction: Direction = "from server", count: int | None = None,
        how: How = "closed",
    ) -> None:  # fmt: skip
        self.port = 0
        #: What has passed, by direction, each piece as it came.
        self.passed: dict[Direction, list[bytes]] = {"from server": [], "from client": []}
        #: Whether a connection was cut.
        self.was_cut = False
        self.direction = direction
        self.count = count
        self._how = how
        self._target = port
        self._transports: list[asyncio.Transport] = []

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Client(self), "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for transport in self._transports:
            transport.abort()

    @property
    def has_ended(self) -> bool:
        """Whether a connection was cut in a way that its client is told of."""
        return self.was_cut and self._how != "silent"

    def total(self, direction: Direction) -> int:
        """Return how many bytes have passed."""
        return sum(map(len, self.passed[direction]))

    def take(self, data: bytes, direction: Direction, write: Callable[[bytes], None]) -> None:
        """Pass on what may pass, and cut behind the last byte of it."""
        if self.was_cut:
            return
        ends = False
        if direction == self.direction and self.count is not None:
            left = self.count - self.total(direction)
            data, ends = data[:left], len(data) >= left
        if data:
            self.passed[direction].append(data)
            write(data)
        if ends:
            self.cut()

    def cut(self) -> None:
        """End all connections."""
        self.was_cut = True
        for transport in self._transports:
            if self._how == "reset":
                reset = struct.pack("ii", 1, 0)
                own = transport.get_extra_info("socket")
                own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            if self._how != "silent":
                transport.close()

    def connected(self, transport: Any) -> asyncio.Transport:
        """Remember one end of a connection, which uvloop makes of a class of its own."""
        self._transports.append(transport)
        made: asyncio.Transport = transport
        return made

    async def reach(self, client: _Client) -> None:
        """Connect a client to the target."""
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: _Server(self, client), "127.0.0.1", self._target)


class _Client(asyncio.Protocol):
    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self.transport: asyncio.Transport
        self._reaching: asyncio.Task[None]
        #: Takes what is sent before the target is reached.
        self.write: Callable[[bytes], None] = self._keep
        self.kept: list[bytes] = []

    def _keep(self, data: bytes) -> None:
        self.kept.append(data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = self.cut.connected(transport)
        if self.cut.count == 0:
            self.cut.cut()
        else:
            self._reaching = asyncio.ensure_future(self.cut.reach(self))

    def data_received(self, data: bytes) -> None:
        self.cut.take(data, "from client", lambda data: self.write(data))

    def connection_lost(self, error: Exception | None) -> None:
        self.cut.cut()


class _Server(asyncio.Protocol):
    def __init__(self, cut: Cut, client: _Client) -> None:
        self.cut = cut
        self.client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        own = self.cut.connected(transport)
        self.client.write = own.write
        for data in self.client.kept:
            own.write(data)
        if self.cut.was_cut and self.cut.count != 0:
            self.cut.cut()

    def data_received(self, data: bytes) -> None:
        self.cut.take(data, "from server", self.client.transport.write)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.cut.was_cut:
            self.cut.cut()
