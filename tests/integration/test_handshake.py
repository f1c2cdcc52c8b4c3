"""A connection that is cut while it is being made is made again, wherever it is cut."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from flask_natspubsub.brokers.base import ConsumerConfig, StreamConfig
from flask_natspubsub.brokers.jetstream.client import NatsBroker
from flask_natspubsub.config.settings import Settings
from tests.support.proxy import CutAfter, Filter, Proxy
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.real_server

#: What the server sends in a handshake, a subscription and the set-up of a stream.
BYTES = 2400
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
def test_a_handshake_that_is_cut_anywhere_is_followed_by_another(
    nats_server: NatsServer, stack: ExitStack, first: int
) -> None:
    cuts = range(first, first + BYTES // 2, STEP)
    dialled = [Dialled(nats_server, stack, cut) for cut in cuts]
    for one in dialled:
        one.begin()
    eventually(lambda: not stuck(dialled), 15, "some never dial again")
    assert all(one.proxy.accepted >= 2 for one in dialled if one.cut_after < 300)


def test_a_cut_behind_the_first_line_is_noticed(nats_server: NatsServer, stack: ExitStack) -> None:
    """Where nobody tells nats-py that what it waits for will not come."""
    info = len(greeting(nats_server))
    dialled = [Dialled(nats_server, stack, info + more) for more in range(14)]
    for one in dialled:
        one.begin()
    eventually(lambda: all(one.broker.is_connected for one in dialled), 15, "it never dials again")


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


def greeting(server: NatsServer) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
        return connection.recv(65536)
