"""The relay on a real server: gone, full, with less room than before, or losing answers."""

from __future__ import annotations

import time

import pytest

from flask_natspubsub.outbox.housekeeping import Timing
from tests.integration.helpers import api
from tests.support.proxy import LoseAcks, Proxy
from tests.support.servers import NatsServer
from tests.support.waiting import eventually, for_seconds

from .conftest import MakeShop
from .shop import OutboxShop, is_subsequence
from .test_relay import wait_for_lease, write

pytestmark = pytest.mark.real_server


def test_stream_and_sequence_are_kept(nats_shop: OutboxShop) -> None:
    shop = nats_shop
    keys = [None, "a", "b", "a"]
    write(shop, *((n, keys[n % 4]) for n in range(200)))
    assert shop.relay().run_once() == 200
    assert shop.sent == list(range(200))
    by_id = {message.headers["Nats-Msg-Id"]: message for message in shop.stored}
    for row in shop.rows:
        message = by_id[row["event_id"]]
        assert (row["stream"], row["stream_sequence"]) == (message.stream, message.sequence)
        assert bytes(row["payload"]) == message.data


def test_wakeup_crosses_from_one_process_to_another(
    make_shop: MakeShop, sqlite: str, nats_server: NatsServer
) -> None:
    """Here from one connection to another, which is the same to the server."""
    writer = make_shop(sqlite, urls=nats_server.url, outbox_poll_interval=60)
    other = make_shop(sqlite, urls=nats_server.url, outbox_poll_interval=60)
    wait_for_lease(other.start_relay())
    for shop in (writer, other):
        shop.broker.connect(10)  # while there is no connection, a wake-up is lost
    for n in range(3):
        began = time.monotonic()
        writer.commit(n)
        other.wait_for_sent(n + 1, 2)
        assert time.monotonic() - began < 2


def test_relay_does_not_spin_while_the_server_is_away(make_shop: MakeShop, sqlite: str) -> None:
    with NatsServer() as server:
        shop = make_shop(sqlite, urls=server.url, outbox_poll_interval=1)
        relay = shop.start_relay()
        shop.commit(1)
        shop.wait_until_marked()
        server.kill()
        eventually(lambda: not shop.broker.is_connected)
        relay.housekeeping.timing = Timing(check=0)
        rounds = 0
        go_round = relay.turn

        def counted() -> float:
            nonlocal rounds
            rounds += 1
            return go_round()

        relay.turn = counted  # type: ignore[method-assign]
        for_seconds(2, lambda: None)
        assert 1 <= rounds <= 10
        shop.stop_relay(relay)


def test_server_away_and_back(make_shop: MakeShop, sqlite: str) -> None:
    with NatsServer() as server:
        shop = make_shop(sqlite, urls=server.url, outbox_poll_interval=0.1, publish_timeout=0.5)
        relay = shop.start_relay()
        shop.commit(*range(10))
        shop.wait_for_sent(10)
        shop.wait_until_marked()
        server.kill()
        began = time.monotonic()
        shop.commit(*range(10, 200))
        assert time.monotonic() - began < 5, "a commit does not wait for the server"
        with shop.counting() as statements:
            for_seconds(3, lambda: None)
            written = [one for one in statements if "UPDATE natspubsub_outbox" in one]
        assert written == []
        assert {row["attempts"] for row in shop.rows} == {0}
        server.start()
        shop.wait_until_marked()
        assert shop.sent == list(range(200))
        assert relay.lease_lost == 0
        shop.stop_relay(relay)


def test_stream_that_is_full_and_emptied(
    make_shop: MakeShop, sqlite: str, nats_server: NatsServer
) -> None:
    shop = make_shop(
        sqlite,
        urls=nats_server.url,
        stream_config={"max_msgs": 5, "discard": "new"},
        outbox_max_attempts=1,
        outbox_poll_interval=0.1,
    )
    relay = shop.start_relay()
    shop.commit(*range(12), ordering_key="k")
    shop.wait_for_sent(5)
    for_seconds(1.5, lambda: None)
    assert shop.sent == [0, 1, 2, 3, 4]
    assert shop.store.counts()["pending"] == 7
    assert {(row["status"], row["attempts"]) for row in shop.rows[5:]} == {("pending", 0)}
    found: list[int] = []
    while len(found) < 12:
        left = 12 - len(found)
        eventually(lambda left=left: shop.count_stored() == min(5, left))
        found += shop.sent
        api(nats_server.url, f"STREAM.PURGE.{shop.state.settings.stream}")
    shop.wait_until_marked()
    assert found == list(range(12))
    shop.stop_relay(relay)


def test_server_that_takes_less_than_before(make_shop: MakeShop, sqlite: str) -> None:
    with NatsServer() as server:
        shop = make_shop(sqlite, urls=server.url, outbox_max_attempts=2, outbox_poll_interval=0.1)
        with shop.app.app_context():
            shop.publish(1, ordering_key="a")
            shop.pubsub.publish("order.created", {"n": 2, "text": "x" * 20_000}, ordering_key="a")
            shop.publish(3, ordering_key="a")
            shop.publish(4)
            shop.session.commit()
        server.config = "max_payload: 10000"
        server.stop()
        server.start()
        shop.start_relay()
        shop.wait_for_sent(3)
        eventually(lambda: shop.store.counts()["parked"] == 1)
        shop.wait_until_marked()
        assert sorted(shop.sent) == [1, 3, 4]
        assert is_subsequence([1, 3], shop.sent)
        assert "10,000" in shop.rows[1]["last_error"]


def test_stream_that_was_deleted(make_shop: MakeShop, sqlite: str, nats_server: NatsServer) -> None:
    """It is made again: what is pending arrives."""
    shop = make_shop(sqlite, urls=nats_server.url, outbox_poll_interval=0.1)
    relay = shop.start_relay()
    shop.commit(1)
    shop.wait_for_sent(1)
    shop.wait_until_marked()
    api(nats_server.url, f"STREAM.DELETE.{shop.state.settings.stream}")
    shop.commit(2)
    shop.wait_until_marked()
    assert shop.sent == [2]
    shop.stop_relay(relay)


def test_answers_that_are_lost(make_shop: MakeShop, sqlite: str, nats_server: NatsServer) -> None:
    """The stream holds each once: what was not acknowledged is sent again under its id."""
    with Proxy(nats_server.port) as proxy:
        count = 0

        def every_tenth() -> bool:
            nonlocal count
            count += 1
            return count % 10 == 0 and count < 200

        proxy.make_filter = lambda: LoseAcks(every_tenth)
        shop = make_shop(sqlite, urls=proxy.url, publish_timeout=0.4, outbox_batch_size=100)
        keys = [None, None, None, "a", "b"]
        write(shop, *((n, keys[n % 5] if n < 50 else None) for n in range(500)))
        relay = shop.start_relay()
        shop.wait_until_marked(60)
        shop.stop_relay(relay)
        assert sorted(shop.sent) == list(range(500))
        for key in (3, 4):
            assert is_subsequence(range(key, 50, 5), shop.sent)
        shop.pubsub.shutdown(shop.app)


def test_server_that_is_frozen(make_shop: MakeShop, sqlite: str) -> None:
    with NatsServer() as server:
        shop = make_shop(sqlite, urls=server.url, publish_timeout=0.5, outbox_poll_interval=0.1)
        relay = shop.start_relay()
        shop.commit(1)
        shop.wait_for_sent(1)
        shop.wait_until_marked()
        server.pause()
        shop.commit(*range(2, 100))
        for_seconds(2, lambda: None)
        assert relay.is_alive
        server.resume()
        shop.wait_until_marked()
        assert shop.sent == list(range(1, 100))
        assert {row["attempts"] for row in shop.rows} == {0}
        shop.stop_relay(relay)
