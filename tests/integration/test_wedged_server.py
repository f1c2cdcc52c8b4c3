"""A server that stays connected and no longer does its work; clients that come back together."""

from __future__ import annotations

import time
from typing import Any

import pytest

from flask_natspubsub import NatsPubsub, PublishError
from flask_natspubsub.brokers.jetstream import client as nats_client
from flask_natspubsub.brokers.jetstream import publish_window
from tests.conftest import MakePubsub
from tests.support.proxy import LoseAcks, Proxy
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.real_server


def ready(pubsub: NatsPubsub) -> int:
    return pubsub.state().app.test_client().get("/health/ready").status_code


def fail_to_publish(pubsub: NatsPubsub) -> None:
    with pytest.raises(PublishError) as caught:
        pubsub.publish("a", {}, timeout=0.3)
    assert caught.value.outcome == "unknown"


def test_a_process_whose_publishes_are_never_acknowledged_is_not_ready(
    make_pubsub: MakePubsub,
    nats_server: NatsServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wedged = False
    with Proxy(nats_server.port) as proxy:
        proxy.make_filter = lambda: LoseAcks(lambda: wedged)
        pubsub = make_pubsub(urls=proxy.url, health_url_prefix="/health", breaker_threshold=0)
        pubsub.publish("a", {})
        assert ready(pubsub) == 200

        wedged = True
        for _ in range(publish_window.UNANSWERED):
            assert ready(pubsub) == 200
            fail_to_publish(pubsub)
        assert ready(pubsub) == 503
        assert pubsub.is_connected
        assert "3 publishes were not acknowledged" in caplog.text
        fail_to_publish(pubsub)
        assert caplog.text.count("were not acknowledged") == 1

        wedged = False
        pubsub.publish("a", {}, timeout=30)
        assert ready(pubsub) == 200
        pubsub.shutdown()


def test_a_process_that_publishes_no_more_is_asked_again(
    make_pubsub: MakePubsub, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert publish_window.UNANSWERED_SECONDS <= 60
    with Proxy(nats_server.port) as proxy:
        proxy.make_filter = lambda: LoseAcks(lambda: True)
        pubsub = make_pubsub(urls=proxy.url, health_url_prefix="/health", breaker_threshold=0)
        assert pubsub.is_connected
        for _ in range(publish_window.UNANSWERED):
            fail_to_publish(pubsub)
        assert ready(pubsub) == 503

        monkeypatch.setattr(publish_window, "UNANSWERED_SECONDS", 0.0)

        assert ready(pubsub) == 200
        pubsub.shutdown()


def test_clients_that_lose_the_server_together_return_one_after_the_other(
    make_pubsub: MakePubsub, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []
    dial = nats_client.dial

    async def timed(*arguments: Any) -> Any:
        times.append(time.monotonic())
        return await dial(*arguments)

    monkeypatch.setattr(nats_client, "dial", timed)
    with Proxy(nats_server.port) as proxy:
        clients = [make_pubsub(f"shop{n}", urls=proxy.url, auto_setup=False) for n in range(20)]
        assert all(client.is_connected for client in clients)
        times.clear()
        proxy.cut()

        eventually(lambda: len(times) >= len(clients), 30)

        assert max(times) - min(times) > 0.3
        eventually(lambda: all(client.is_connected for client in clients), 30)
        for client in clients:
            client.shutdown()
