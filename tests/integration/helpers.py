"""Helpers of tests on a real server."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import nats
import pytest
from nats.aio.msg import Msg

from flask_natspubsub import NatsPubsub, NotConnected, PublishError, PublishReceipt
from flask_natspubsub.messages.message import StoredMessage


def stored(pubsub: NatsPubsub) -> list[StoredMessage]:
    """All messages of the main stream, oldest first."""
    state = pubsub.state()
    return list(state.broker().messages(state.settings.stream))


def count(pubsub: NatsPubsub) -> int:
    """Number of messages in the main stream."""
    state = pubsub.state()
    info = state.broker().stream_info(state.settings.stream)
    return info.messages if info else 0


def event_ids(messages: list[StoredMessage]) -> list[str]:
    return [message.headers["Nats-Msg-Id"] for message in messages]


def seen_by_another_client(
    url: str, subject: str, action: Callable[[], object], expected: int = 1, **options: Any
) -> list[Msg]:
    """Do ``action`` while another NATS client listens to ``subject``; what it received."""

    async def main() -> list[Msg]:
        client = await nats.connect(url, **options)
        try:
            subscription = await client.subscribe(subject)
            await client.flush()
            await asyncio.to_thread(action)
            return [await subscription.next_msg(timeout=5) for _ in range(expected)]
        finally:
            await client.close()

    return asyncio.run(main())


def api(url: str, verb: str, body: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Ask the JetStream API by way of another client."""

    async def main() -> dict[str, Any]:
        client = await nats.connect(url, **options)
        try:
            payload = json.dumps(body).encode() if body is not None else b""
            reply = await client.request(f"$JS.API.{verb}", payload, timeout=5)
            answer: dict[str, Any] = json.loads(reply.data)
            return answer
        finally:
            await client.close()

    return asyncio.run(main())


_HPUB = re.compile(rb"HPUB (\S+) (\S+) (\d+) (\d+)\r\n")


def frames(data: bytes) -> list[tuple[str, bytes, bytes]]:
    """Subject, header block and payload of every HPUB in what a client has sent."""
    found = []
    for match in _HPUB.finditer(data):
        size, total = int(match[3]), int(match[4])
        start = match.end()
        if len(data) >= start + total:
            found.append(
                (match[1].decode(), data[start : start + size], data[start + size : start + total])
            )
    return found


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Check that the block does not take longer."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took <= seconds, f"took {took:.2f} s, {seconds} s were allowed"


class Outcome:
    """What one call of ``publish`` came to, and how long it took."""

    def __init__(self, pubsub: NatsPubsub, event_id: str, timeout: float) -> None:
        self.event_id = event_id
        self.receipt: PublishReceipt | None = None
        self.error: PublishError | None = None
        began = time.monotonic()
        try:
            self.receipt = pubsub.publish(
                "order.created", {"id": event_id}, event_id=event_id, timeout=timeout
            )
        except PublishError as error:
            self.error = error
        self.seconds = time.monotonic() - began


def up(pubsub: NatsPubsub) -> bool:
    """Whether there is a connection, without waiting for one as ``is_connected`` does."""
    return pubsub.state().broker().is_connected


def refusal(pubsub: NatsPubsub) -> str:
    """The text of the error that a publish ends with, at once and not after its timeout."""
    with at_most(4), pytest.raises(NotConnected) as caught:
        pubsub.publish("a", {}, timeout=10)
    return str(caught.value)
