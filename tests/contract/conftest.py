"""One suite, two brokers: in memory, and a real nats-server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from flask_natspubsub.brokers.base import Broker
from flask_natspubsub.brokers.jetstream.client import NatsBroker
from flask_natspubsub.brokers.memory.broker import MemoryBroker
from flask_natspubsub.config.settings import Settings
from tests.support.servers import NatsServer

from .helpers import TIMEOUT, Place


@pytest.fixture(params=["memory", pytest.param("nats", marks=pytest.mark.real_server)])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    made: Broker
    if request.param == "memory":
        made = MemoryBroker()
    else:
        server: NatsServer = request.getfixturevalue("nats_server")
        made = NatsBroker(Settings(urls=(server.url,), env="test", app_name="shop"))
    try:
        made.connect(TIMEOUT)
        yield made
    finally:
        made.close()


@pytest.fixture
def empty_place(broker: Broker) -> Place:
    """An environment without a stream."""
    return Place(broker, f"t{uuid.uuid4().hex[:12]}")


@pytest.fixture
def place(empty_place: Place) -> Place:
    """An environment with the main stream."""
    empty_place.make_stream()
    return empty_place
