"""A TCP proxy that misbehaves on request: slow, cut, half-open, or losing acknowledgements."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from tests.support.managed import Managed

#: Takes what the server sent, returns what the client gets.
Filter = Callable[[bytes], bytes]


class Proxy(Managed):
    """Stands between a client and ``port``; a context manager.

    :param delay: seconds that everything is late, in each direction.
    """

    def __init__(self, port: int, *, delay: float = 0.0) -> None:
        self.delay = delay
        self.port = 0
        #: All that clients have sent, of all connections.
        self.from_clients = bytearray()
        #: Number of connections accepted so far.
        self.accepted = 0
        #: Called for each connection to make its filter of what the server sends.
        self.make_filter: Callable[[], Filter] | None = None
        self._target = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._flowing = _open_event()
        self._held: list[asyncio.Event] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def url(self) -> str:
        """The address for clients."""
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen on a free port."""
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Close all connections and the listener."""
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def cut(self) -> None:
        """Close all connections; new ones are accepted."""
        self._do(self._abort())

    def hold(self) -> None:
        """Make a black hole of the connections there are: nothing is read, none is closed."""
        self._do(self._hold())

    def release(self) -> None:
        """End ``hold``."""
        self._do(self._release())

    # --- the proxy's thread

    def _do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _hold(self) -> None:
        self._flowing.clear()
        self._held.append(self._flowing)
        self._flowing = _open_event()

    async def _release(self) -> None:
        for flowing in self._held:
            flowing.set()

    async def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        await self._abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        flowing = self._flowing
        self._keep(asyncio.current_task())
        self._writers.add(writer)
        try:
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(to_writer)
        back = self.make_filter() if self.make_filter else bytes
        outwards = self._pump(reader, to_writer, self._record, flowing)
        self._keep(asyncio.create_task(outwards))
        # A task that asyncio made for the server may not end as cancelled: that is logged.
        with contextlib.suppress(asyncio.CancelledError):
            await self._pump(to_reader, writer, back, flowing)

    def _keep(self, task: asyncio.Task[Any] | None) -> None:
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _record(self, data: bytes) -> bytes:
        self.from_clients += data
        return data

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        through: Filter,
        flowing: asyncio.Event,
    ) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(64 * 1024):
                    await flowing.wait()
                    passed = through(data)
                    if self.delay:
                        self._loop.call_later(self.delay, _write, writer, passed)
                    else:
                        writer.write(passed)
                        await writer.drain()
                    if getattr(through, "is_over", False):
                        return
        finally:
            self._writers.discard(writer)
            writer.transport.abort()


def _open_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    if not writer.is_closing():
        writer.write(data)


class CutAfter:
    """A filter that passes the first ``count`` bytes of the server, then cuts the connection."""

    def __init__(self, count: int) -> None:
        self._left = count

    @property
    def is_over(self) -> bool:
        """Whether all have gone through."""
        return self._left <= 0

    def __call__(self, data: bytes) -> bytes:
        passed = data[: self._left]
        self._left -= len(passed)
        return passed


class LoseAcks:
    """A filter that drops the server's acknowledgements of publishes as ``lose`` says.

    :param lose: called for each acknowledgement; True loses it.
    """

    def __init__(self, lose: Callable[[], bool]) -> None:
        self._lose = lose
        self._buffer = b""

    def __call__(self, data: bytes) -> bytes:
        self._buffer += data
        passed = []
        while (frame := self._next_frame()) is not None:
            if not (frame.startswith(b"MSG") and b'{"stream":' in frame and self._lose()):
                passed.append(frame)
        return b"".join(passed)

    def _next_frame(self) -> bytes | None:
        line, found, _ = self._buffer.partition(b"\r\n")
        if not found:
            return None
        size = len(line) + 2
        if line.startswith((b"MSG", b"HMSG")):
            size += int(line.rsplit(b" ", 1)[1]) + 2
        if len(self._buffer) < size:
            return None
        frame, self._buffer = self._buffer[:size], self._buffer[size:]
        return frame
