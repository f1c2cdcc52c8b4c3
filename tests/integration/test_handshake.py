"""A connection that is cut while it is being made is made again, wherever it is cut."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from flask_natspubsub.brokers.base import ConsumerConfig, StreamConfig
from flask_natspubsub.brokers.jetstream.client import NatsBroker, dial
from flask_natspubsub.brokers.jetstream.connection import Connection, LinkOwner
from flask_natspubsub.brokers.jetstream.link import Link
from flask_natspubsub.brokers.jetstream.states import Timing
from flask_natspubsub.brokers.jetstream.stream_api import JetStreamApi
from flask_natspubsub.brokers.loop import BackgroundLoop
from flask_natspubsub.config.settings import Settings
from tests.support.certificates import Authority
from tests.support.cutting import Cut, Direction, How
from tests.support.proxy import CutAfter, Filter, Proxy
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.real_server

#: Where a cut is silent, the deadlines of the states are all that ends them.
HURRIED = Timing(
    subscribing=0.5,
    setting_up=0.5,
    first_pause=0.001,
    return_within=0.001,
    refused_pause=600.0,  # nobody refuses here: a cut that is taken for a refusal is found
)
PATIENT = HURRIED._replace(subscribing=5.0, setting_up=5.0)
#: Seconds within which a link is up or dials again, wherever it was cut. The deadlines add up to
#: three; the rest is for a machine that does much else.
BOUND = 40.0
AT_ONCE = 200
STREAMS = [StreamConfig(name="sweep", subjects=("sweep.>",))]


class Attempt(LinkOwner):
    """A link whose first connection is cut, and which is watched until it dials again.

    It has three routes and sets up a stream: a worker asks a server for the same before it is up.
    """

    def __init__(self, loop: BackgroundLoop, settings: Settings, timing: Timing) -> None:
        self.settings = settings
        self.link = Link(settings, loop, self._dial, self, timing)
        self.dials_again = asyncio.Event()
        self._dialled = False

    async def _dial(self, *arguments: Any) -> Connection:
        if self._dialled:
            self.dials_again.set()
            await asyncio.Event().wait()
        self._dialled = True
        return await dial(*arguments)

    async def set_up(self) -> None:
        api = JetStreamApi(lambda subject, body: self.link.request(subject, body, 5))
        await api.setup(STREAMS, dry_run=False)

    async def goes_on(self, cut: Cut) -> bool:
        """Whether the link dials again within ``BOUND``; or is up, if its connection has not ended.

        Where a cut is silent, a link that is up notices it by its pings.
        """
        for subject in ("events", "replies.*", "wake-ups"):
            await self.link.route(f"{self.settings.reply_prefix}.{subject}", lambda *_: None)
        keeping = asyncio.create_task(self.link.keep_up())
        try:
            async with asyncio.timeout(BOUND):
                while not (self.link.is_up and not cut.has_ended):
                    if self.dials_again.is_set():
                        return True
                    await asyncio.sleep(0.01)
            return True
        except TimeoutError:
            return False
        finally:
            await self.link.close(0.1)
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)


class Sweep:
    """Attempts at one server, many of them at once.

    :param scheme: of the URL; the settings go with it.
    """

    def __init__(self, server: NatsServer, scheme: str = "nats", **settings: Any) -> None:
        self._server = server
        self._scheme = scheme
        self._settings = settings
        self._loop = BackgroundLoop("sweep")

    def close(self) -> None:
        self._loop.stop()

    def _attempt(self, cut: Cut, timing: Timing) -> Attempt:
        url = f"{self._scheme}://127.0.0.1:{cut.port}"
        connect_timeout = 0.3 if timing is HURRIED else 5.0
        settings = Settings(urls=(url,), connect_timeout=connect_timeout, **self._settings)
        return Attempt(self._loop, settings, timing)

    def uncut(self) -> Cut:
        """Connect without a cut; returns what was said until the link was up."""

        async def main() -> Cut:
            async with Cut(self._server.port) as cut:
                attempt = self._attempt(cut, PATIENT)
                assert await attempt.goes_on(cut)
                assert not attempt.dials_again.is_set()
                return cut

        self._loop.call(main(), 30)  # the stream is made
        return self._loop.call(main(), 30)

    def stuck(self, direction: Direction, how: How, counts: Iterable[int]) -> list[int]:
        """Return after which numbers of bytes a cut leaves a link that does not dial again."""
        timing = HURRIED if how == "silent" else PATIENT

        async def main() -> list[int]:
            room = asyncio.Semaphore(AT_ONCE)

            async def attempt(count: int) -> tuple[int, bool]:
                async with room, Cut(self._server.port, direction, count, how) as cut:
                    return count, await self._attempt(cut, timing).goes_on(cut)

            done = await asyncio.gather(*map(attempt, counts))
            return [count for count, goes_on in done if not goes_on]

        return self._loop.call(main(), 300)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of connections are lost here, each with a line in the log."""
    caplog.set_level(logging.CRITICAL, "flask_natspubsub.broker")


@pytest.fixture(scope="module")
def sweep(nats_server: NatsServer) -> Iterator[Sweep]:
    made = Sweep(nats_server)
    yield made
    made.close()


@pytest.fixture(scope="module")
def tls_sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    pair = authority.sign()
    config = f'tls {{ cert_file: "{pair.certificate}", key_file: "{pair.key}" }}'
    with NatsServer(config) as server:
        made = Sweep(server, "tls", tls_ca_file=str(authority.file))
        yield made
        made.close()


HOWS: list[How] = ["closed", "reset", "silent"]
DIRECTIONS: list[Direction] = ["from server", "from client"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_cut_at_any_byte_of_a_handshake_is_followed_by_another(
    sweep: Sweep, direction: Direction, how: How
) -> None:
    total = sweep.uncut().total(direction)
    assert total > 400
    assert sweep.stuck(direction, how, range(total)) == []


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_cut_around_any_record_of_a_tls_connection_is_followed_by_another(
    tls_sweep: Sweep, direction: Direction, how: How
) -> None:
    """TLS gives out a record once it is complete: all cuts within one leave the same.

    The ends of records move by a few bytes, since signatures differ in length.
    """
    said = b"".join(tls_sweep.uncut().passed[direction])
    ends = list(ends_of_records(said))
    assert len(ends) > 8
    cuts = {end + more for end in ends for more in range(-3, 4)}
    assert tls_sweep.stuck(direction, how, sorted(cuts)) == []


def ends_of_records(said: bytes) -> Iterator[int]:
    """Where the greeting ends, if there is one, and each TLS record behind it."""
    at = said.index(b"\r\n") + 2 if said.startswith(b"INFO") else 0
    if at:
        yield at
    while at < len(said):
        at += 5 + int.from_bytes(said[at + 3 : at + 5])
        yield at


# --- brokers, which make their streams and pull


#: What the server sends in a handshake, a subscription and the set-up of a stream.
BYTES = 2400
#: Between two cuts: each of these requests and replies is read as the one in a sweep is.
STEP = 60


class Dialled:
    """A broker whose first connection ends after so many bytes."""

    def __init__(self, server: NatsServer, stack: ExitStack, cut_after: int) -> None:
        self.cut_after = cut_after
        self._filters: list[Filter] = [CutAfter(cut_after)]
        self.proxy = stack.enter_context(Proxy(server.port))
        self.proxy.make_filter = lambda: self._filters.pop() if self._filters else bytes
        env = f"t{uuid.uuid4().hex[:12]}"
        self.stream = StreamConfig(name=env, subjects=(f"{env}.>",))
        self.broker = NatsBroker(Settings(urls=(self.proxy.url,), env=env, app_name="shop"))
        stack.callback(self.broker.close, 1.0)
        self.broker.want([self.stream])
        self.consumer = ConsumerConfig(
            stream=env, durable="mailer", filter_subjects=(f"{env}.shop.>",)
        )

    def begin(self) -> None:
        assert not self.broker.is_connected
        self.broker.send(f"{self.stream.name}.x", b"")  # dials, and waits for nothing


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.mark.parametrize("first", [0, BYTES // 2])
def test_a_broker_whose_streams_are_being_made_is_connected_in_the_end(
    nats_server: NatsServer, stack: ExitStack, first: int
) -> None:
    cuts = range(first, first + BYTES // 2, STEP)
    dialled = [Dialled(nats_server, stack, cut) for cut in cuts]
    for one in dialled:
        one.begin()
    eventually(lambda: not stuck(dialled), 15, "some never dial again")
    assert all(one.proxy.accepted >= 2 for one in dialled if one.cut_after < 300)


def test_a_pull_begins_although_the_connection_was_cut_meanwhile(
    nats_server: NatsServer, stack: ExitStack
) -> None:
    for cut in (400, 900, 1800):
        one = Dialled(nats_server, stack, cut)
        pull = one.broker.consume(one.consumer, lambda delivery: None)
        eventually(lambda one=one: one.broker.is_connected, 15)
        pull.request(1)
        eventually(lambda pull=pull: pull.is_healthy, 15)
        pull.stop()


def stuck(dialled: list[Dialled]) -> list[int]:
    """After how many bytes those were cut that have no connection."""
    return [one.cut_after for one in dialled if not one.broker.is_connected]
