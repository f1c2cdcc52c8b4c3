"""How long a client waits before it tries to connect again, and what it then restores."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from flask_natspubsub import BrokerError
from flask_natspubsub.brokers.jetstream.link import (
    LONGEST_PAUSE,
    RETURN_WITHIN,
    Link,
    jittered,
)
from flask_natspubsub.brokers.loop import BackgroundLoop
from flask_natspubsub.brokers.wire import Route
from flask_natspubsub.config.settings import Settings

CLIENTS = 100


@pytest.mark.parametrize(
    ("pause", "was_up"),
    [(0.05, True), (LONGEST_PAUSE, True), (LONGEST_PAUSE, False)],
    ids=["lost a moment ago", "lost again", "away for long"],
)
def test_a_hundred_clients_do_not_return_at_the_same_moment(pause: float, was_up: bool) -> None:
    random.seed(1)
    pauses = [jittered(pause, was_up=was_up) for _ in range(CLIENTS)]
    tenths = Counter(int(seconds * 10) for seconds in pauses)

    assert max(tenths.values()) <= CLIENTS * 0.2


def test_who_has_lost_the_connection_is_back_soon() -> None:
    assert RETURN_WITHIN <= 1
    assert all(0 <= jittered(0.05, was_up=True) <= RETURN_WITHIN for _ in range(1000))


class FakeConnection:
    """A connection whose ``subscribe`` fails as it is told to."""

    version, max_payload, unsent, servers, cluster_size = "2.12.0", 1024, 0, (), 1

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.told = asyncio.Event()
        self.subscribed: list[str] = []
        self.failure: Exception | None = None

    def send(self, frames: Sequence[bytes]) -> None:
        raise AssertionError("nothing is sent here")

    async def subscribe(self, subject: str, route: Route) -> int:
        if self.failure is not None:
            raise self.failure
        self.subscribed.append(subject)
        self.told.set()
        return len(self.subscribed)

    async def unsubscribe(self, handle: int, *, flush: bool) -> None:
        del self.subscribed[handle - 1]

    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        raise AssertionError("nothing is asked here")

    async def flush(self, timeout: float) -> None:
        pass

    async def close(self) -> None:
        self.closed.set()


def test_interest_that_could_not_be_told_is_not_told_to_the_next_connection() -> None:
    connections = [FakeConnection(), FakeConnection()]
    waiting = iter(connections)

    async def dial(*_: object) -> FakeConnection:
        return next(waiting)

    async def main() -> None:
        link = Link(Settings(), loop, dial)
        keeping = asyncio.create_task(link.keep_up())
        await link.wait_up(5)
        await link.route("kept", lambda *_: None)
        connections[0].failure = OSError("cut")
        with pytest.raises(BrokerError, match=r"Could not listen to given\.up: cut"):
            await link.route("given.up", lambda *_: None)

        await connections[0].close()
        await link.route("kept.too", lambda *_: None)
        await asyncio.wait_for(connections[1].told.wait(), 10)
        await link.wait_up(5)
        assert connections[1].subscribed == ["kept", "kept.too"]
        await link.close(1)
        await keeping

    loop = BackgroundLoop("test-link")
    try:
        loop.call(main(), 20)
    finally:
        loop.stop(2)
