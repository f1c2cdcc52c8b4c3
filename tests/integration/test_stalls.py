"""What does not stop the others: large messages, and thousands that wait for their retry."""

from __future__ import annotations

from collections import Counter

import pytest

from flask_natspubsub import Retry
from tests.support.proxy import Proxy
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

from .shop import Recorder, Shop

pytestmark = pytest.mark.real_server

#: Settings under which a server takes longer than a test until it gives a slow client up.
PATIENT = 'write_deadline: "60s"'
#: Of what waits for one client: fewer bytes than ``LARGE`` messages, more than a worker asks for.
ROOM = "max_pending: 40MB"
LARGE, SIZE = 60, 900_000


def publish_padded(shop: Shop, sizes: list[int], first: int = 0) -> None:
    """Publish one message for each size, in bytes, numbered from ``first``."""
    for n, size in enumerate(sizes, first):
        shop.pubsub.publish("order.created", {"n": n, "pad": "x" * size})


def wait_until_handled_once(seen: Recorder, count: int) -> None:
    seen.wait_for_numbers(range(count))
    assert Counter(seen.numbers) == dict.fromkeys(range(count), 1)


def unsettled(shop: Shop) -> int:
    info = shop.consumer()
    return info.ack_pending if info else 0


# --- large messages


def test_a_worker_asks_for_no_more_bytes_than_the_server_can_keep_for_it(make_shop) -> None:
    """Once it has seen many small messages, it asks for many; and then come large ones."""
    with NatsServer(f"{ROOM}\n{PATIENT}") as server, Proxy(server.port) as proxy:
        shop, other = make_shop(urls=proxy.url), make_shop(urls=server.url)
        seen = shop.record("order.created")
        worker = shop.work()
        other.publish("order.created", *range(2_000))
        seen.wait_for_numbers(range(2_000))
        proxy.hold()
        publish_padded(other, [SIZE] * LARGE, 2_000)
        given = 0

        def no_more_are_given() -> bool:
            nonlocal given
            before, given = given, unsettled(other)
            return given == before > 0

        eventually(no_more_are_given, interval=0.2)
        proxy.release()
        wait_until_handled_once(seen, 2_000 + LARGE)
        shop.wait_until_settled()
        assert worker.is_healthy
        assert proxy.accepted == 1
        assert "Slow Consumer" not in server.log


def test_a_message_larger_than_the_server_takes_today_comes_as_do_those_behind_it(
    make_shop,
) -> None:
    """No request for messages may ask for so many bytes, and it was stored before."""
    small, large = 10, 5_000_000
    sizes = [small, large, small, large, large, small]
    with NatsServer("max_payload: 8MB") as server:
        shop = make_shop(urls=server.url)
        seen = shop.record("order.created")
        publish_padded(shop, sizes)
        server.stop()
        server.config = "max_payload: 1MB"
        server.start()
        worker = shop.work()
        wait_until_handled_once(seen, len(sizes))
        assert shop.state.broker().max_payload == 1024 * 1024
        found = {message["n"]: len(message["pad"]) for message in seen.messages}
        assert found == dict(enumerate(sizes))
        publish_padded(shop, [small] * 5, len(sizes))
        wait_until_handled_once(seen, len(sizes) + 5)
        shop.wait_until_settled()
        assert worker.is_healthy
        assert shop.dead_letters == []


# --- a backlog


def test_thousands_that_wait_for_their_retry_do_not_stop_the_others(shop: Shop) -> None:
    waiting, good = 3_000, 50

    def then(message, context) -> None:
        if message["n"] < waiting:
            raise Retry(delay=3600)

    seen = shop.record("order.created", then=then)
    worker = shop.work()
    shop.publish("order.created", *range(waiting))
    seen.wait_for_numbers(range(waiting), 30)
    shop.publish("order.created", *range(waiting, waiting + good))
    seen.wait_for_numbers(range(waiting, waiting + good), 15)

    assert worker.is_healthy
    eventually(lambda: unsettled(shop) == waiting)
    assert shop.consumer().pending == 0
    assert Counter(seen.numbers) == dict.fromkeys(range(waiting + good), 1)
    assert shop.dead_letters == []
