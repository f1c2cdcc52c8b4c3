"""One journey of messages on each nats-server that is supported."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.support.server_versions import VERSIONS, binary
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.real_server


def _server_param(version):
    is_long = version not in (VERSIONS[0], VERSIONS[-1])
    return pytest.param(version, marks=[pytest.mark.long] if is_long else [])


@pytest.fixture(params=map(_server_param, VERSIONS))
def server(request):
    """A server of each version."""
    with NatsServer(binary=binary(request.param)) as server:
        yield server


class Refusing:
    """A handler's end: fails number 13 once, and 14 until it is mended."""

    def __init__(self):
        self.is_mended = False

    def __call__(self, message, context):
        threading.Event().wait(0.001)
        if message["n"] == 13 and context.attempt == 1:
            raise ValueError("not yet")
        if message["n"] == 14 and not self.is_mended:
            raise ValueError("broken")


def publish(shop, numbers):
    """Publish each with an id of its own; whether it was a duplicate, in order."""
    batch = [("order.created", {"n": n}, {"event_id": f"e{n}"}) for n in numbers]
    return [receipt.duplicate for receipt in shop.pubsub.publish_many(batch)]


def test_a_journey(make_shop, server, request):
    version = request.node.callspec.params["server"]
    shop = make_shop(urls=server.url, backoff=[0.2], ack_wait=2)
    then = Refusing()
    seen = shop.record("order.created", then=then, max_deliver=2)
    pubsub = shop.pubsub
    assert pubsub.is_connected
    assert shop.state.broker().server_version == version
    changes = shop.state.broker().setup(shop.state.streams())
    assert [change.action for change in changes] == ["ok", "ok"]
    assert publish(shop, range(100)) == [False] * 100
    assert publish(shop, range(100)) == [True] * 100

    shop.work(concurrency=4)
    (letter,) = shop.wait_for_dead_letters(1)
    seen.wait_for_numbers(range(100))
    shop.wait_until_settled()
    assert (letter.event_id, letter.deliveries) == ("e14", 2)
    attempts = [c.attempt for c in seen.contexts if c.event_id == "e13"]
    assert attempts[:2] == [1, 2]

    then.is_mended = True
    pubsub.dead_letters.replay(letter)
    eventually(lambda: seen.numbers.count(14) >= 3, 20)
    eventually(lambda: not shop.dead_letters, 20)

    publish(shop, range(100, 300))
    assert shop.state.broker().delete_consumer(shop.settings.stream, "shop-mailer")
    publish(shop, range(300, 400))
    seen.wait_for_numbers(range(400))
    shop.wait_until_settled()

    server.kill()
    server.start()
    eventually(lambda: pubsub.is_connected, 20)
    assert publish(shop, [399, *range(400, 450)]) == [True, *[False] * 50]
    seen.wait_for_numbers(range(450))
    shop.wait_until_settled()
    assert shop.dead_letters == []


def test_the_documentation_names_the_versions():
    text = (Path(__file__).parents[2] / "docs" / "deployment.rst").read_text()

    assert [version for version in VERSIONS if version not in text] == []
