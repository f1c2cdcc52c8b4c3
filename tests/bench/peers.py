"""The references: nats-py used in the obvious way, and one blocking socket without a client."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import json
import socket
import threading
import time
import uuid
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import nats
from nats.aio.client import Client
from nats.js.api import ConsumerConfig

PAYLOAD = b'{"event_id":"01a1fbc6-f435-719c-868d-67159933ed83","message":{"order_id":1,' + (
    b'"note":"' + b"x" * 220 + b'"}}'
)


class NatsPy:
    """nats-py on a loop in a thread, as a synchronous site would use it without this package."""

    def __init__(self, url: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.client: Client = self.call(nats.connect(url))
        self.js = self.client.jetstream()

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def close(self) -> None:
        self.call(self.client.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def publish_one(self, subject: str) -> None:
        self.call(self.js.publish(subject, PAYLOAD))

    def publish_message(self, subject: str, message: dict[str, Any]) -> None:
        """Publish what this package publishes: an envelope, a header, an id."""
        payload, headers = _written_out(message)
        self.call(self.js.publish(subject, payload, headers=headers))

    def publish_row(self, subject: str, payload: bytes, event_id: str) -> None:
        """Publish a row of an outbox, as one would relay it by hand."""
        self.call(self.js.publish(subject, payload, headers={"Nats-Msg-Id": event_id}))

    def publish_gather_messages(self, subject: str, messages: Sequence[dict[str, Any]]) -> None:
        """The same as ``publish_gather`` with what this package publishes."""

        async def one(message: dict[str, Any]) -> None:
            payload, headers = _written_out(message)
            await self.js.publish(subject, payload, headers=headers)

        async def run() -> None:
            await asyncio.gather(*map(one, messages))

        self.call(run())

    def publish_gather(self, subject: str, count: int) -> None:
        async def run() -> None:
            await asyncio.gather(*(self.js.publish(subject, PAYLOAD) for _ in range(count)))

        self.call(run())

    def publish_async(self, subject: str, count: int) -> None:
        async def run() -> None:
            futures = [await self.js.publish_async(subject, PAYLOAD) for _ in range(count)]
            await asyncio.gather(*futures)

        self.call(run())

    def publish_async_messages(self, subject: str, messages: Sequence[dict[str, Any]]) -> None:
        """The same with what this package publishes, see ``publish_message``."""

        async def run() -> None:
            futures = []
            for message in messages:
                payload, headers = _written_out(message)
                futures.append(await self.js.publish_async(subject, payload, headers=headers))
            await asyncio.gather(*futures)

        self.call(run())

    def make_consumer(self, subject: str, stream: str, durable: str) -> None:
        config = ConsumerConfig(
            durable_name=durable, filter_subject=subject, max_ack_pending=20_000
        )
        self.call(self.js.add_consumer(stream, config))

    def fetch(self, subject: str, stream: str, durable: str, count: int, batch: int) -> float:
        """Fetch and acknowledge ``count`` messages; returns the seconds it took after the first."""

        async def run() -> float:
            subscription = await self.js.pull_subscribe(subject, durable=durable, stream=stream)
            for message in await subscription.fetch(1, timeout=10):
                await message.ack()
            began = time.perf_counter()
            done = 0
            while done < count:
                for message in await subscription.fetch(batch, timeout=10):
                    await message.ack()
                    done += 1
            await self.client.flush()
            seconds = time.perf_counter() - began
            await subscription.unsubscribe()
            return seconds

        seconds: float = self.call(run())
        return seconds


def _written_out(message: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    """Write envelope and headers of a message, as one would by hand."""
    event_id = str(uuid.uuid4())
    envelope = {
        "event_id": event_id,
        "schema_version": 1,
        "topic": "order.created",
        "producer": "shop",
        "occurred_at": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
        "message": message,
    }
    return json.dumps(envelope).encode(), {"topic": "order.created", "Nats-Msg-Id": event_id}


class RawSocket:
    """The limit: frames made beforehand, one write, acknowledgements counted by a thread."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "", parts.port or 4222))
        self._socket.recv(65536)
        self._socket.sendall(
            b'CONNECT {"verbose":false,"headers":true}\r\nSUB _INBOX.raw 1\r\nPING\r\n'
        )
        while b"PONG" not in self._socket.recv(65536):
            pass

    def publish(self, subject: str, count: int) -> None:
        self.publish_in_turn([subject], count)

    def publish_in_turn(self, subjects: Sequence[str], count: int) -> None:
        """Publish ``count`` messages, one to each subject and again."""
        size = len(PAYLOAD)
        each = [b"PUB %b _INBOX.raw %d\r\n%b\r\n" % (s.encode(), size, PAYLOAD) for s in subjects]
        self._send(b"".join(itertools.islice(itertools.cycle(each), count)), count)

    def publish_frames(self, frames: Sequence[bytes]) -> None:
        """Publish what ``frames_of`` has made."""
        self._send(b"".join(frames), len(frames))

    def _send(self, frames: bytes, count: int) -> None:
        reader = threading.Thread(target=self._count, args=(count,))
        reader.start()
        self._socket.sendall(frames)
        reader.join()

    def pull(self, stream: str, durable: str, count: int, batch: int) -> None:
        """Pull and acknowledge ``count`` messages, two requests at a time under way."""
        ask = b'{"batch":%d,"expires":30000000000}' % batch
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}".encode()
        request = b"PUB %b _INBOX.raw %d\r\n%b\r\n" % (subject, len(ask), ask)
        self._socket.sendall(request * 2)
        done, asked, rest = 0, 2 * batch, b""
        while done < count:
            data = rest + self._socket.recv(1 << 20)
            replies, rest = _replies(data)
            acks = [b"PUB %b 4\r\n+ACK\r\n" % reply for reply in replies]
            done += len(acks)
            while asked - done <= batch and asked < count:
                acks.append(request)
                asked += batch
            self._socket.sendall(b"".join(acks))

    def pull_from_all(self, stream: str, durables: Sequence[str], each: int) -> None:
        """Pull and acknowledge ``each`` messages of every consumer."""
        ask = b'{"batch":%d,"expires":30000000000}' % each
        for durable in durables:
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}".encode()
            self._socket.sendall(b"PUB %b _INBOX.raw %d\r\n%b\r\n" % (subject, len(ask), ask))
        left, rest = each * len(durables), b""
        while left:
            replies, rest = _replies(rest + self._socket.recv(1 << 20))
            self._socket.sendall(b"".join(b"PUB %b 4\r\n+ACK\r\n" % reply for reply in replies))
            left -= len(replies)

    def _count(self, count: int) -> None:
        seen, tail = 0, b""
        while seen < count:
            data = tail + self._socket.recv(1 << 20)
            seen += data.count(b"MSG _INBOX.raw")
            tail = data[-13:] if b"MSG _INBOX.raw" not in data[-13:] else b""

    def close(self) -> None:
        self._socket.close()


def frames_of(subject: str, message: dict[str, Any], count: int) -> list[bytes]:
    """Make the frames of what this package publishes: envelope, headers, an id for each."""
    frames = []
    for _ in range(count):
        payload, headers = _written_out(message)
        block = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"NATS/1.0\r\n{block}\r\n".encode()
        line = f"HPUB {subject} _INBOX.raw {len(head)} {len(head) + len(payload)}\r\n"
        frames.append(b"".join((line.encode(), head, payload, b"\r\n")))
    return frames


def _replies(data: bytes) -> tuple[list[bytes], bytes]:
    """Return where to acknowledge the messages in ``data``, and the frame that is not complete."""
    replies, at = [], 0
    while (end := data.find(b"\r\n", at)) >= 0:
        words = data[at:end].split()
        if words[0] not in (b"MSG", b"HMSG"):
            at = end + 2
            continue
        following = end + 4 + int(words[-1])
        if following > len(data):
            break
        if words[3].startswith(b"$JS.ACK"):
            replies.append(words[3])
        at = following
    return replies, data[at:]


def per_second(count: int, run: Any) -> float:
    """Time ``run`` and return operations a second."""
    started = time.perf_counter()
    run()
    return count / (time.perf_counter() - started)


def in_threads(threads: int, count: int, one: Any) -> None:
    """Call ``one`` ``count`` times, spread over threads."""
    with ThreadPoolExecutor(threads) as pool:
        share = count // threads
        list(pool.map(lambda _: [one() for _ in range(share)], range(threads)))


@contextmanager
def closing(thing: Any) -> Iterator[Any]:
    """Close ``thing`` at the end."""
    try:
        yield thing
    finally:
        thing.close()
