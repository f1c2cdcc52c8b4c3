"""The states of a link: how long each lasts, where it leads, and what is restored."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from flask_natspubsub import BrokerError, NotConnected
from flask_natspubsub.brokers.jetstream.connection import (
    ConnectionLost,
    ConnectionRefused,
    LinkOwner,
    within,
)
from flask_natspubsub.brokers.jetstream.link import Link
from flask_natspubsub.brokers.jetstream.states import NEXT, TIMING, State, Timing, jittered
from flask_natspubsub.brokers.loop import BackgroundLoop
from flask_natspubsub.brokers.wire import Route
from flask_natspubsub.config.settings import Settings

CLIENTS = 100


@pytest.mark.parametrize(
    ("pause", "was_up"),
    [(0.05, True), (TIMING.longest_pause, True), (TIMING.longest_pause, False)],
    ids=["lost a moment ago", "lost again", "away for long"],
)
def test_a_hundred_clients_do_not_return_at_the_same_moment(pause: float, was_up: bool) -> None:
    random.seed(1)
    pauses = [jittered(pause, was_up=was_up) for _ in range(CLIENTS)]
    tenths = Counter(int(seconds * 10) for seconds in pauses)

    assert max(tenths.values()) <= CLIENTS * 0.2


def test_who_has_lost_the_connection_is_back_soon() -> None:
    assert TIMING.return_within <= 1
    assert all(0 <= jittered(0.05, was_up=True) <= TIMING.return_within for _ in range(1000))


class FakeConnection:
    """A connection that fails, or hangs, as it is told to."""

    version, max_payload, unsent, servers, cluster_size = "2.12.0", 1024, 0, (), 1

    def __init__(self, hangs: str = "", failure: Exception | None = None) -> None:
        self.closed = asyncio.Event()
        self.subscribed: list[str] = []
        self.hangs = hangs
        self.failure = failure

    async def _answer(self, step: str) -> None:
        if self.hangs == step:
            with contextlib.suppress(asyncio.CancelledError):  # nats-py does so in places
                await asyncio.Event().wait()
            await asyncio.Event().wait()

    def send(self, frames: Sequence[bytes]) -> None:
        raise AssertionError("nothing is sent here")

    async def subscribe(self, subject: str, route: Route) -> int:
        await self._answer("subscribe")
        if self.failure is not None:
            raise self.failure
        self.subscribed.append(subject)
        return len(self.subscribed)

    async def unsubscribe(self, handle: int, *, flush: bool) -> None:
        await self._answer("unsubscribe")
        del self.subscribed[handle - 1]

    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        await self._answer("request")
        return b"answer"

    async def flush(self) -> None:
        await self._answer("flush")

    async def close(self) -> None:
        self.closed.set()


#: So short that a test which waits for all of them is not slow.
HURRIED = Timing(
    subscribing=0.1,
    setting_up=0.1,
    first_pause=0.001,
    longest_pause=0.01,
    return_within=0.01,
    refused_pause=0.05,
)


class Owner(LinkOwner):
    """Notes what the link reports, and the state in which it does."""

    def __init__(self) -> None:
        self.link: Link
        self.heard: list[str] = []
        self.hangs = False
        self.failure: Exception | None = None

    async def set_up(self) -> None:
        self.heard.append("set up")
        assert self.link.state is State.SETTING_UP
        if self.hangs:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure

    def on_up(self) -> None:
        assert self.link.state is State.UP
        assert self.link.is_up
        self.heard.append("up")

    def on_down(self) -> None:
        assert not self.link.is_up
        self.heard.append(f"down, {self.link.state.value}")


#: What a dial gives: a connection, an error, or None to hang.
Dialled = FakeConnection | Exception | None


class Bench:
    """A link whose dials give what the test has prepared; in the end, good connections."""

    def __init__(self, loop: BackgroundLoop, *dialled: Dialled, settings: Settings | None) -> None:
        self.dialled = list(dialled)
        self.connections: list[FakeConnection] = []
        self.tries = 0
        self.owner = Owner()
        self.link = self.owner.link = Link(
            settings or Settings(), loop, self._dial, self.owner, HURRIED
        )

    async def _dial(self, *_: object) -> FakeConnection:
        assert self.link.state is State.DIALLING
        self.tries += 1
        given = self.dialled.pop(0) if self.dialled else FakeConnection()
        if given is None:
            await asyncio.Event().wait()
        if isinstance(given, Exception):
            raise given
        assert given is not None
        self.connections.append(given)
        return given


def run(
    test: Callable[[Bench], Coroutine[Any, Any, None]],
    *dialled: Dialled,
    settings: Settings | None = None,
) -> None:
    """Run a test with a link that keeps itself up, and close it."""

    async def main() -> None:
        bench = Bench(loop, *dialled, settings=settings)
        keeping = asyncio.create_task(bench.link.keep_up())
        try:
            await test(bench)
        finally:
            await bench.link.close(0.1)
            await asyncio.wait_for(keeping, 5)
        assert bench.link.state is State.CLOSING
        assert all(connection.closed.is_set() for connection in bench.connections)

    loop = BackgroundLoop("test-link")
    try:
        loop.call(main(), 20)
    finally:
        loop.stop(2)


def test_interest_that_could_not_be_told_is_not_told_to_the_next_connection() -> None:
    async def test(bench: Bench) -> None:
        link = bench.link
        await link.wait_up(5)
        await link.route("kept", lambda *_: None)
        bench.connections[0].failure = OSError("cut")
        with pytest.raises(BrokerError, match=r"Could not listen to given\.up: cut"):
            await link.route("given.up", lambda *_: None)

        await bench.connections[0].close()
        await link.route("kept.too", lambda *_: None)
        await restored(bench, 2)
        assert bench.connections[1].subscribed == ["kept", "kept.too"]

    run(test)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - of what there is no event
            await asyncio.sleep(0)


async def restored(bench: Bench, number: int) -> None:
    """Wait until the link is up with this connection."""
    await until(lambda: len(bench.connections) >= number and bench.link.is_up)


# --- the states


def test_a_link_that_comes_up_reports_each_step_once() -> None:
    async def test(bench: Bench) -> None:
        assert bench.link.state is State.DOWN
        await bench.link.wait_up(5)
        assert bench.owner.heard == ["set up", "up"]
        await bench.link.reset("a test wants it")
        await restored(bench, 2)
        assert bench.owner.heard == ["set up", "up", "down, down", "set up", "up"]

    run(test)


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(None, id="a dial that never ends"),
        pytest.param(OSError("nothing listens"), id="a dial that fails"),
        pytest.param(RuntimeError("unforeseen"), id="a dial that fails in an unforeseen way"),
        pytest.param(ConnectionRefused("too old"), id="a server that refuses"),
        pytest.param("subscribe", id="a subscription that never ends"),
        pytest.param(ValueError("cut"), id="a subscription that fails"),
    ],
)
def test_from_every_state_there_is_a_way_back_within_a_bound(
    first: Exception | str | None,
) -> None:
    given: Dialled
    if isinstance(first, str):
        given = FakeConnection(hangs=first)
    elif isinstance(first, ValueError):
        given = FakeConnection(failure=first)
    else:
        given = first

    async def test(bench: Bench) -> None:
        await bench.link.route("kept", lambda *_: None)
        await restored(bench, len(bench.connections) or 1)
        assert bench.tries == 2
        assert bench.connections[-1].subscribed == ["kept"]

    run(test, given, settings=Settings(connect_timeout=0.1))


def test_a_connection_that_is_cut_while_it_subscribes_is_dialled_again_at_once() -> None:
    hanging = FakeConnection(hangs="subscribe")

    async def test(bench: Bench) -> None:
        await bench.link.route("kept", lambda *_: None)
        await until(lambda: bench.link.state is State.SUBSCRIBING)
        hanging.closed.set()
        await restored(bench, 2)

    run(test, hanging)


@pytest.mark.parametrize("how", ["hangs", "fails", "fails in an unforeseen way"])
def test_a_set_up_that_does_not_succeed_is_logged_and_keeps_nobody_from_publishing(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(bench: Bench) -> None:
        bench.owner.hangs = how == "hangs"
        bench.owner.failure = {
            "fails": BrokerError("no quorum"),
            "fails in an unforeseen way": ValueError("nonsense"),
        }.get(how)
        await bench.link.wait_up(5)

    run(test)

    lines = [r.getMessage() for r in caplog.records if "set up" in r.getMessage()]
    assert len(lines) == 1
    assert (
        lines[0]
        == {
            "hangs": "the streams could not be set up within 0.1 s",
            "fails": "the streams could not be set up: no quorum",
            "fails in an unforeseen way": "the streams could not be set up",
        }[how]
    )


def test_a_cut_during_the_set_up_ends_it() -> None:
    async def test(bench: Bench) -> None:
        bench.owner.hangs = True
        await until(lambda: "set up" in bench.owner.heard)
        bench.owner.hangs = False
        await bench.connections[0].close()
        await restored(bench, 2)
        assert bench.owner.heard == ["set up", "down, down", "set up", "up"]

    run(test)


@pytest.mark.parametrize("hangs", ["subscribe", "unsubscribe", "request", "flush"])
def test_what_hangs_while_the_link_is_up_is_given_up_in_time(hangs: str) -> None:
    async def test(bench: Bench) -> None:
        await bench.link.wait_up(5)
        key = await bench.link.route("kept", lambda *_: None)
        bench.connections[0].hangs = hangs
        async with asyncio.timeout(2):
            if hangs == "subscribe":
                with pytest.raises(BrokerError, match="Could not listen to more"):
                    await bench.link.route("more", lambda *_: None)
            elif hangs == "unsubscribe":
                await bench.link.unroute(key, flush=True)
            elif hangs == "request":
                with pytest.raises(BrokerError, match="did not answer asked within"):
                    await bench.link.request("asked", b"", 0.1)

    run(test)


def test_a_request_ends_when_the_connection_does() -> None:
    async def test(bench: Bench) -> None:
        await bench.link.wait_up(5)
        bench.connections[0].hangs = "request"
        asking = asyncio.create_task(bench.link.request("asked", b"", 60))
        await asyncio.sleep(0)
        await bench.connections[0].close()
        with pytest.raises(BrokerError, match=r"No answer from asked: the connection was lost\."):
            await asyncio.wait_for(asking, 5)

    run(test)


def test_who_is_refused_is_told_and_tries_again() -> None:
    async def test(bench: Bench) -> None:
        await until(lambda: bench.link.state is State.REFUSED)
        with pytest.raises(NotConnected, match="refused the connection: too old"):
            await bench.link.wait_up(5)
        assert bench.owner.heard == ["down, refused"]
        await restored(bench, 1)
        assert bench.link.refused == ""

    run(test, ConnectionRefused("too old"))


@pytest.mark.parametrize("state", [State.DOWN, State.DIALLING, State.SUBSCRIBING, State.SETTING_UP])
def test_it_can_be_closed_in_every_state(state: State) -> None:
    dialled: dict[State, Dialled] = {
        State.DOWN: OSError("away"),
        State.DIALLING: None,
        State.SUBSCRIBING: FakeConnection(hangs="subscribe"),
    }

    async def test(bench: Bench) -> None:
        bench.owner.hangs = True
        await bench.link.route("kept", lambda *_: None)
        await until(lambda: bench.link.state is state)

    run(test, dialled.get(state, FakeConnection()), settings=Settings(connect_timeout=0.1))


def test_every_state_leads_back_to_dialling() -> None:
    assert set(NEXT) == set(State)
    for state in set(State) - {State.CLOSING}:
        reached, new = {state}, {state}
        while new:
            new = {after for one in new for after in NEXT[one]} - reached
            reached |= new
        assert State.UP in reached, state


# --- deadlines


async def stubborn() -> None:
    """Swallow every cancellation, as nats-py does in places, for a while."""
    for _ in range(3):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.5)


def test_nothing_is_awaited_longer_than_the_deadline_whatever_it_does() -> None:
    async def main() -> None:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="does not answer"):
            await within(0.05, stubborn())
        assert time.monotonic() - began < 0.4

    asyncio.run(main())


def test_nothing_is_awaited_beyond_the_loss_of_the_connection() -> None:
    async def main() -> None:
        lost = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, lost.set)
        with pytest.raises(ConnectionLost, match="was lost"):
            await within(60, asyncio.Event().wait(), lost)

    asyncio.run(main())


def test_what_fails_after_it_was_given_up_is_not_reported_as_unseen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError("too late to matter")

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await within(0.01, fail())
        await asyncio.sleep(0)

    asyncio.run(main())
    gc.collect()
    assert caplog.text == ""
