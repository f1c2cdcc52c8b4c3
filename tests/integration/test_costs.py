"""What things cost, in counts that a busy machine does not change.

Each bound is the count there is now and a little; lower it when the count gets lower.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import flask_natspubsub
from flask_natspubsub import NatsPubsub, signals
from flask_natspubsub.brokers.jetstream.pull import Pull
from tests.conftest import MakePubsub
from tests.support.proxy import Proxy
from tests.support.servers import NatsServer
from tests.support.waiting import eventually, for_seconds

from .conftest import MakeShop

pytestmark = pytest.mark.real_server

PACKAGE = str(Path(flask_natspubsub.__file__).parent)
MESSAGE = {"order_id": 1, "note": "x" * 200}

#: Bytes that a publish sends beyond the payload: verb, subjects, sizes, headers.
FRAME_BYTES = 180
#: Bytes of an acknowledgement of a handled message.
ACK_BYTES = 110
#: Calls of this package's functions for a publish, in the thread of its caller.
CALLS_PUBLISHED = 31
#: Calls of this package's functions for a handled message.
CALLS_HANDLED = 40
#: Requests to the server for 200 messages of one subscriber, with none asked for beforehand.
PULLS_FOR_200 = 12
#: Blocks of memory that a receipt and all that belongs to it keep, for each publish.
BLOCKS_KEPT = 5


@contextmanager
def wake_ups(pubsub: NatsPubsub) -> Iterator[list[Any]]:
    """Collect what other threads ask of the loop meanwhile: each is a wake-up."""
    broker: Any = pubsub.state().broker()
    loop = broker._session.loop.loop
    asked: list[Any] = []
    original = loop.call_soon_threadsafe

    def counting(callback: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(callback)
        return original(callback, *arguments, **options)

    loop.call_soon_threadsafe = counting
    try:
        yield asked
    finally:
        del loop.call_soon_threadsafe


@pytest.fixture
def connected(pubsub: NatsPubsub) -> NatsPubsub:
    """An extension with a connection, and everything made that the first publish makes."""
    pubsub.publish("order.created", MESSAGE)
    return pubsub


def test_many_published_together_wake_the_loop_once(connected: NatsPubsub) -> None:
    with wake_ups(connected) as asked:
        connected.publish_many([("order.created", MESSAGE)] * 1_000)
    assert len(asked) == 1


def test_publishes_that_nobody_waits_for_share_wake_ups(connected: NatsPubsub) -> None:
    """The loop, once awake, takes all that has come; it is asked again only after that."""
    release = threading.Event()
    broker: Any = connected.state().broker()
    broker._session.loop.loop.call_soon_threadsafe(release.wait)
    with wake_ups(connected) as asked:
        futures = [connected.publish_nowait("order.created", MESSAGE) for _ in range(1_000)]
        release.set()
        for future in futures:
            future.result(30)
    assert len(asked) == 1


def test_a_publish_that_is_waited_for_wakes_the_loop_at_most_once(connected: NatsPubsub) -> None:
    def publish_some(_: int) -> None:
        for _ in range(125):
            connected.publish("order.created", MESSAGE, timeout=30)

    with wake_ups(connected) as asked, ThreadPoolExecutor(8) as pool:
        list(pool.map(publish_some, range(8)))
    assert len(asked) <= 1_000


def test_bytes_sent_for_a_publish(make_pubsub: MakePubsub, nats_server: NatsServer) -> None:
    with Proxy(nats_server.port) as proxy:
        pubsub = make_pubsub(urls=proxy.url)
        pubsub.publish("order.created", MESSAGE)
        before = len(proxy.from_clients)
        pubsub.publish_many([("order.created", MESSAGE)] * 500)
        sent = len(proxy.from_clients) - before
        state = pubsub.state()
        stored = state.broker().get_message(state.settings.stream, 2)
        pubsub.shutdown()
    assert stored is not None
    assert sent / 500 - len(stored.data) <= FRAME_BYTES


def test_bytes_sent_for_a_handled_message(make_shop: MakeShop, nats_server: NatsServer) -> None:
    with Proxy(nats_server.port) as proxy:
        shop = make_shop(urls=proxy.url)
        seen = shop.record("order.created")
        worker = shop.work()
        shop.publish("order.created", *range(10))
        seen.wait_for_numbers(range(10))
        shop.wait_until_settled("mailer")
        worker.stop()
        acks = proxy.from_clients.count(b"+ACK\r\n")
        sizes = [
            len(b"PUB \r\n") + len(line) + len(b"+ACK\r\n")
            for line in bytes(proxy.from_clients).split(b"PUB ")
            if line.startswith(b"$JS.ACK")
        ]
    assert acks == 10
    assert max(sizes) <= ACK_BYTES


#: Prints the least of several: now and then a cache is filled.
COUNT_CALLS = """
import sys
from flask import Flask
from flask_natspubsub import NatsPubsub, signals
url, package = sys.argv[1:]
app = Flask("counted")
app.config.update(NATSPUBSUB_URLS=url, NATSPUBSUB_ENV="counted")
pubsub, counts = NatsPubsub(app), []
def count(frame, event, argument):
    counts[-1] += event == "call" and frame.f_code.co_filename.startswith(package)
for _ in range(20):
    counts.append(0)
    sys.setprofile(count)
    pubsub.publish("order.created", {"order_id": 1})
    sys.setprofile(None)
pubsub.shutdown()
print(min(counts))
"""


def test_calls_for_a_publish(nats_server: NatsServer) -> None:
    """In a process of its own: what other tests have left would count as well."""
    command = [sys.executable, "-c", COUNT_CALLS, nats_server.url, PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr
    assert 10 < int(done.stdout) <= CALLS_PUBLISHED


def test_calls_for_a_handled_message(
    connected: NatsPubsub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one message to the next, in the thread that handles them; Flask's are not counted."""
    calls: list[int] = []
    done = threading.Event()
    handling: set[int] = set()

    @connected.subscriber("order.created", name="counted")
    def handle(message: dict[str, object]) -> None:
        handling.add(threading.get_ident())
        calls.append(0)
        if len(calls) == 100:
            done.set()

    def count(frame: Any, event: str, argument: Any) -> None:
        own = event == "call" and frame.f_code.co_filename.startswith(PACKAGE)
        if own and threading.get_ident() in handling:
            calls[-1] += 1

    connected.publish_many([("order.created", MESSAGE)] * 99)
    for signal in (signals.message_received, signals.message_handled):
        monkeypatch.setattr(signal, "receivers", {})  # those that other tests have left cost calls
    threading.setprofile(count)
    try:
        with connected.run_worker(concurrency=1):
            assert done.wait(30)
    finally:
        threading.setprofile(None)
    assert 10 < statistics.median(calls[:-1]) <= CALLS_HANDLED


def test_pulls_do_not_grow_with_the_subscribers(
    connected: NatsPubsub, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulls: Counter[str] = Counter()
    request = Pull.request

    def counting(pull: Pull, count: int) -> None:
        pulls[pull.config.durable] += 1
        request(pull, count)

    monkeypatch.setattr(Pull, "request", counting)
    done, numbers = threading.Event(), itertools.count(1)
    for number in range(20):
        connected.subscriber(f"topic{number}", name=f"s{number}")(
            lambda message: done.set() if next(numbers) == 4_000 else None
        )
    with connected.run_worker():
        connected.publish_many([(f"topic{n % 20}", MESSAGE) for n in range(4_000)])
        assert done.wait(60)
    assert len(pulls) == 20
    assert max(pulls.values()) <= PULLS_FOR_200


def test_a_publish_leaves_nothing_behind(connected: NatsPubsub) -> None:
    """Blocks of memory in use, before and after: what is kept for each would add up."""
    batch = [("order.created", MESSAGE)] * 1_000
    connected.publish_many(batch)
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(5):
        connected.publish_many(batch)
    gc.collect()
    assert sys.getallocatedblocks() - before < 300, "5,000 messages were published"


def test_memory_that_a_receipt_keeps(connected: NatsPubsub) -> None:
    batch = [("order.created", MESSAGE)] * 1_000
    connected.publish_many(batch)
    gc.collect()
    before = sys.getallocatedblocks()
    receipts = connected.publish_many(batch)
    gc.collect()
    kept = sys.getallocatedblocks() - before
    assert len(receipts) == 1_000
    assert kept / 1_000 <= BLOCKS_KEPT


# --- an idle process


def test_no_thread_before_the_first_publish(
    make_pubsub: MakePubsub, nats_server: NatsServer
) -> None:
    before = threading.active_count()
    pubsub = make_pubsub(urls=nats_server.url, health_url_prefix="/health")
    app = pubsub.state().app
    app.add_url_rule("/", "index", lambda: "hello")
    client = app.test_client()
    for path in ("/", "/health/live"):
        assert client.get(path).status_code == 200
    assert threading.active_count() == before
    with app.app_context():
        pubsub.publish("order.created", MESSAGE)
    assert threading.active_count() == before + 1


def test_an_idle_worker_asks_the_server_for_next_to_nothing(
    make_shop: MakeShop, nats_server: NatsServer
) -> None:
    """Twenty subscribers: each asks once for messages, and not again for 30 seconds."""
    with Proxy(nats_server.port) as proxy:
        shop = make_shop(urls=proxy.url)
        for number in range(20):
            shop.record("order.created", name=f"s{number}")
        worker = shop.work()
        pulls = lambda: proxy.from_clients.count(b"CONSUMER.MSG.NEXT")  # noqa: E731
        eventually(lambda: pulls() >= 20, 30)
        before = len(proxy.from_clients)
        with wake_ups(shop.pubsub) as asked:
            for_seconds(2, lambda: None)
        assert bytes(proxy.from_clients[before:]).count(b"PUB ") <= 4
        assert asked == []
        assert pulls() == 20
        worker.stop()
