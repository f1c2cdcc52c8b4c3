"""A server that does not keep up makes publishers wait; the process does not grow."""

from __future__ import annotations

import gc
import itertools
import sys
import threading
from concurrent.futures import Future, wait
from typing import Any

import pytest

from flask_natspubsub import NatsPubsub, PublishError
from flask_natspubsub.brokers.jetstream import publish_window
from flask_natspubsub.worker.processes.vitals import Heartbeat
from tests.conftest import MakePubsub
from tests.support.proxy import Proxy
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.real_server

IN_FLIGHT, QUEUED = 50, 100


def load_in_health(pubsub: NatsPubsub) -> dict[str, Any]:
    client = pubsub.state().app.test_client()
    found: dict[str, Any] = client.get("/health/detailed").json["checks"]["nats"]  # type: ignore[index]
    return found


def fill(pubsub: NatsPubsub, count: int, timeout: float) -> list[Future[Any]]:
    message = {"x": "y" * 1_000}
    return [pubsub.publish_nowait("a", message, timeout=timeout) for _ in range(count)]


def test_black_hole_bounds_what_is_held_and_health_shows_it(
    make_pubsub: MakePubsub, nats_server: NatsServer
) -> None:
    with Proxy(nats_server.port) as proxy:
        pubsub = make_pubsub(
            urls=proxy.url,
            publish_in_flight=IN_FLIGHT,
            publish_queue=QUEUED,
            health_url_prefix="/health",
            breaker_threshold=0,
        )
        pubsub.publish("a", {})
        proxy.hold()
        futures = fill(pubsub, IN_FLIGHT + QUEUED, timeout=20)

        eventually(lambda: load_in_health(pubsub)["publishes_in_flight"] == IN_FLIGHT, 20)
        load = load_in_health(pubsub)
        assert load["publishes_in_flight_limit"] == IN_FLIGHT
        assert load["publishes_queued"] == load["publishes_queued_limit"] == QUEUED
        assert 0 < load["publishes_queued_bytes"] < load["publishes_queued_bytes_limit"]
        with pytest.raises(PublishError, match="waiting to be sent already"):
            fill(pubsub, 1, timeout=0.2)[0].result(20)

        proxy.release()
        for future in futures:
            assert future.result(20).stream
        assert load_in_health(pubsub)["publishes_queued"] == 0


def test_wave_after_wave_that_nobody_takes_leaves_nothing_behind(
    make_pubsub: MakePubsub, nats_server: NatsServer
) -> None:
    with Proxy(nats_server.port) as proxy:
        pubsub = make_pubsub(
            urls=proxy.url,
            publish_in_flight=IN_FLIGHT,
            publish_queue=QUEUED,
            breaker_threshold=0,
        )
        pubsub.publish("a", {})
        proxy.hold()
        blocks = []
        for _ in range(4):
            futures = fill(pubsub, QUEUED, timeout=0.3)
            wait(futures, 30)
            assert all(isinstance(future.exception(0), PublishError) for future in futures)
            del futures
            gc.collect()
            blocks.append(sys.getallocatedblocks())
        assert blocks[-1] - blocks[1] < 10 * QUEUED, blocks
        proxy.release()


def test_worker_holds_no_more_than_its_limit_and_shows_it(
    make_pubsub: MakePubsub, nats_server: NatsServer
) -> None:
    pubsub = make_pubsub(urls=nats_server.url, prefetch=20, concurrency=2)
    release, handled, held = threading.Event(), itertools.count(1), []

    @pubsub.subscriber("a", name="held")
    def handle(message: dict[str, object]) -> None:
        held.append(worker.load()["messages_in_hand"])
        if next(handled) > 300:  # fast until then, so that it asks for as much as it may
            release.wait(30)

    with pubsub.run_worker() as worker:
        heartbeat = Heartbeat(worker)
        pubsub.publish_many([("a", {"n": n}) for n in range(400)])
        eventually(lambda: len(held) == 302, 30)
        shown = heartbeat.look()[1]["messages"]
        release.set()
        eventually(lambda: len(held) == 400, 30)

    assert shown["messages_in_hand_limit"] == 20
    assert 2 < max(held) <= 20
    assert 2 <= shown["messages_in_hand"] <= 20


def test_socket_that_takes_nothing_is_not_written_to_for_ever(
    make_pubsub: MakePubsub, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has timed out is no longer in flight, but is in the socket's buffer still."""
    limit = 2_000_000
    monkeypatch.setattr(publish_window, "IN_FLIGHT_BYTES", limit)
    with Proxy(nats_server.port) as proxy:
        pubsub = make_pubsub(urls=proxy.url, breaker_threshold=0)
        pubsub.publish("a", {})
        proxy.hold()
        broker: Any = pubsub.state().broker()
        link, large = broker._session.link, {"x": "y" * 500_000}
        unsent = []
        for _ in range(12):
            wait([pubsub.publish_nowait("a", large, timeout=0.1) for _ in range(4)], 20)
            unsent.append(link.unsent)
        assert limit < max(unsent) <= 2 * limit + 600_000
        assert unsent[-1] == unsent[-2], "nothing more is written"
        proxy.release()
        eventually(lambda: link.unsent == 0, 20)
        assert pubsub.publish("a", {}, timeout=20).stream
