"""The least that can publish this package's messages from threads: no limits, no second chance."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Any, cast
from urllib.parse import urlsplit

from flask_natspubsub.brokers.loop import BackgroundLoop
from flask_natspubsub.brokers.wire import frame, header_block
from flask_natspubsub.config.settings import Settings
from flask_natspubsub.messages.message import Message
from flask_natspubsub.observability.tracing import current_lineage
from flask_natspubsub.publishing.draft import Draft
from flask_natspubsub.publishing.publisher import prepare

HANDSHAKE = b'CONNECT {"verbose":false,"headers":true}\r\nSUB _INBOX.bare.* 1\r\nPING\r\n'
#: Frames written together: the server begins with them while the next are made.
WRITE = 100
TIMEOUT = 30.0


class _Waiter:
    """Waits for so many acknowledgements."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._lock = threading.Lock()
        self._lock.acquire()

    def acknowledge(self) -> None:
        self._left -= 1
        if not self._left:
            self._lock.release()

    def wait(self) -> None:
        assert self._lock.acquire(timeout=TIMEOUT), "the server did not answer"


class Bare(asyncio.Protocol):
    """One connection; the envelope, its id and the frame are made as the package makes them."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._settings = settings
        self._arrived: deque[tuple[Message, _Waiter]] = deque()
        self._scheduled = False
        self._waiters: dict[str, _Waiter] = {}
        self._number = 0
        self._rest = b""
        self._ready = _Waiter(1)
        self._background = BackgroundLoop("bare")
        place = urlsplit(url)
        self._background.call(self._connect(place.hostname or "", place.port or 4222), TIMEOUT)
        self._ready.wait()

    async def _connect(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: self, host, port)
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(HANDSHAKE)

    def publish(self, topic: str, message: dict[str, Any], count: int = 1) -> None:
        """Publish a message so many times, and wait until the server has stored them."""
        lineage, waiter = current_lineage(), _Waiter(count)
        drafts = [Draft(topic, message) for _ in range(count)]
        made = [prepare(draft, self._settings, lineage) for draft in drafts]
        self._arrived.extend([(one, waiter) for one in made])
        if not self._scheduled:
            self._scheduled = True
            self._background.loop.call_soon_threadsafe(self._send)
        waiter.wait()

    def _send(self) -> None:
        self._scheduled = False
        frames = []
        while self._arrived:
            message, waiter = self._arrived.popleft()
            self._number += 1
            reply = f"_INBOX.bare.{self._number}"
            self._waiters[reply] = waiter
            headers = header_block(message.headers)
            frames.append(frame(message.subject, message.data, reply, headers))
            if len(frames) == WRITE:
                self._transport.write(b"".join(frames))
                frames.clear()
        self._transport.write(b"".join(frames))

    def data_received(self, data: bytes) -> None:
        """Take a line for what it begins with: acknowledgements have no other lines in them."""
        lines = (self._rest + data).split(b"\r\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"MSG "):
                self._waiters.pop(line.split(b" ", 2)[1].decode()).acknowledge()
            elif line.startswith(b'{"error"'):
                raise AssertionError(line)  # the connection ends, and so does the wait
            elif line == b"PONG":
                self._ready.acknowledge()
            elif line == b"PING":
                self._transport.write(b"PONG\r\n")

    def close(self) -> None:
        self._background.loop.call_soon_threadsafe(self._transport.abort)
        self._background.stop()
