"""What a worker survives: its own death, the server's, and the loss of what it works on."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

from flask_natspubsub import PublishError
from flask_natspubsub.brokers.base import StreamConfig
from flask_natspubsub.brokers.jetstream.client import NatsBroker
from tests.support.proxy import Proxy
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

from .shop import by_hand

pytestmark = pytest.mark.real_server

ROOT = Path(__file__).parents[2]


class Crashing:
    """Runs ``crashing_worker`` and reads its journal."""

    def __init__(self, shop, folder, **settings):
        self._arguments = [
            shop.settings.urls[0],
            shop.settings.env,
            str(folder),
            *(f"{key.upper()}={value}" for key, value in settings.items()),
        ]
        self._journal = folder / "journal"
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.crashing_worker", *self._arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
        )

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def lines(self, word):
        """The journal's lines that begin with ``word``, as (n, attempt)."""
        text = self._journal.read_text() if self._journal.exists() else ""
        rows = [line.split() for line in text.splitlines()]
        return [tuple(map(int, row[1:])) for row in rows if row[0] == word]


@pytest.fixture
def crashing(tmp_path):
    made = []

    def make(shop, **settings):
        made.append(Crashing(shop, tmp_path, **settings))
        return made[-1]

    yield make
    for worker in made:
        worker.kill()


@pytest.fixture
def server():
    """A server of the test's own, which it may stop and kill."""
    with NatsServer() as server:
        yield server


@contextmanager
def publishing(shop, count, topic="order.created"):
    """Publish numbers in a thread while the block runs, each until it is stored."""
    errors, stored = [], []

    def publish(number):
        for _ in range(60):
            try:
                shop.pubsub.publish(topic, {"n": number}, event_id=f"e{number}", timeout=1)
                stored.append(number)
                return
            except PublishError:
                shop.released.wait(0.05)
        errors.append(f"{number} could not be published")

    def run():
        for number in range(count):
            publish(number)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield stored
    finally:
        thread.join(90)
    assert not thread.is_alive()
    assert errors == []


# --- the worker's own death


def test_what_a_killed_worker_had_in_hand_is_delivered_again(shop, crashing):
    worker = crashing(shop, ack_wait=1.5)
    worker.start()
    eventually(lambda: worker.lines("ready"), 20)
    items = [{"n": n, "hang": n < 2} for n in range(6)]
    shop.pubsub.publish_many([("job.created", item) for item in items])
    eventually(lambda: len(worker.lines("begin")) == 6)
    worker.kill()
    worker.start()

    eventually(lambda: {0, 1} <= {n for n, _ in worker.lines("end")}, 15)
    ends = worker.lines("end")
    assert {n for n, _ in ends} == set(range(6))
    assert {attempt for n, attempt in ends if n < 2} == {2}
    shop.wait_until_settled()
    assert shop.dead_letters == []


def test_a_message_that_kills_workers_ends_as_a_dead_letter_and_bystanders_are_handled(
    shop, crashing
):
    worker = crashing(shop, ack_wait=0.7, max_deliver=2)
    worker.start()
    eventually(lambda: worker.lines("ready"), 20)
    poison = 13
    items = [{"n": n, "seconds": 0.05, "die": n == poison} for n in range(60)]
    shop.pubsub.publish_many([("job.created", item) for item in items])
    deaths = 0

    def is_over():
        nonlocal deaths
        if worker.process.poll() is not None:
            deaths += 1
            worker.start()
        return shop.is_settled()

    eventually(is_over, 40, "the message that kills was never given up on", interval=0.05)
    (letter,) = shop.dead_letters
    assert letter.reason == "max_deliver_exceeded"
    assert b'"die":true' in letter.data
    assert {n for n, _ in worker.lines("end")} == set(range(60)) - {poison}
    # Twice among others, once alone, and not again.
    assert deaths == 3
    assert [attempt for n, attempt in worker.lines("begin") if n == poison] == [1, 2, 3]
    assert letter.deliveries == 4
    assert "each time the worker died" in letter.error
    stream = shop.state.broker().stream_info(shop.settings.dead_letter_stream)
    assert stream.messages == 1, "marks of runs alone were left behind"


# --- what it works on is lost


def test_a_deleted_consumer_is_made_anew_and_nothing_is_lost(shop):
    seen = shop.record("order.created", then=lambda *_: threading.Event().wait(0.001))
    shop.work(concurrency=4)
    broker = shop.state.broker()
    with publishing(shop, 600) as stored:
        for reached in (100, 300, 500):
            eventually(lambda reached=reached: len(stored) >= reached, 30)
            assert broker.delete_consumer(shop.settings.stream, "shop-mailer")
            eventually(shop.consumer, 10, "the consumer was not made anew")
    seen.wait_for_numbers(range(600))
    shop.wait_until_settled()


def test_a_consumer_deleted_while_idle_is_made_anew(shop):
    seen = shop.record("order.created")
    shop.work()
    shop.publish("order.created", 1)
    seen.wait_for_numbers([1])
    shop.wait_until_settled()
    assert shop.state.broker().delete_consumer(shop.settings.stream, "shop-mailer")
    shop.publish("order.created", 2)
    seen.wait_for_numbers([1, 2], timeout=10)


@pytest.mark.parametrize("again", ["by the next publish", "by hand"])
def test_a_deleted_stream_is_worked_on_again_once_it_is_back(shop, again):
    seen = shop.record("order.created")
    shop.work()
    shop.publish("order.created", 1, 2, 3)
    seen.wait(3)
    shop.wait_until_settled()
    name = shop.settings.stream

    async def delete(client):
        await client.jetstream().delete_stream(name)

    shop.by_hand(delete)
    if again == "by hand":
        shop.state.broker().setup(shop.state.streams())
    shop.publish("order.created", 4, 5)

    seen.wait(5, timeout=15)
    shop.wait_until_settled()
    assert sorted(seen.numbers) == [1, 2, 3, 4, 5]
    assert min(context.sequence for context in seen.contexts[3:]) == 1


# --- the server


def test_an_idle_worker_works_on_after_each_restart_of_the_server(make_shop, server):
    shop = make_shop(urls=server.url, ack_wait=2)  # acks may die with the server
    seen = shop.record("order.created")
    worker = shop.work()
    for number in range(6):
        (server.stop if number % 2 else server.kill)()
        server.start()
        eventually(lambda n=number: _publish(shop, n), 10)
        seen.wait_for_numbers([number], timeout=10)
    shop.wait_until_settled()
    eventually(lambda: worker.is_healthy)
    assert sorted(set(seen.numbers)) == list(range(6))


def _publish(shop, number):
    try:
        return shop.pubsub.publish("order.created", {"n": number}, event_id=f"e{number}", timeout=1)
    except PublishError:
        return None


def test_killing_the_server_under_load_loses_nothing(make_shop, server):
    # Each kill is one more delivery of what is in hand, and so is each stall of the machine.
    shop = make_shop(urls=server.url, ack_wait=2, breaker_threshold=0, max_deliver=100)
    seen = shop.record("order.created", then=lambda *_: threading.Event().wait(0.002))
    shop.work(concurrency=4)
    with publishing(shop, 1500) as stored:
        for reached in (300, 800, 1200):
            eventually(lambda reached=reached: len(stored) >= reached, 30)
            server.kill()
            server.start()
    seen.wait_for_numbers(range(1500))
    shop.wait_until_settled()
    assert shop.dead_letters == []


def test_cutting_the_connection_under_load_loses_nothing(make_shop, server):
    with Proxy(server.port) as proxy:
        shop = make_shop(urls=proxy.url, ack_wait=2, breaker_threshold=0)
        seen = shop.record("order.created", then=lambda *_: threading.Event().wait(0.002))
        worker = shop.work(concurrency=4)
        with publishing(shop, 1000) as stored:
            for reached in (200, 400, 600, 800):
                eventually(lambda reached=reached: len(stored) >= reached, 30)
                proxy.cut()
        seen.wait_for_numbers(range(1000))
        shop.wait_until_settled()
        worker.stop()
        shop.pubsub.shutdown()


def test_a_worker_started_before_the_server_begins_when_it_is_there(make_shop, server):
    server.stop()
    shop = make_shop(urls=server.url, connect_timeout=0.2)
    seen = shop.record("order.created")
    worker = shop.work()
    assert not worker.is_healthy
    server.start()
    eventually(lambda: _publish(shop, 1))
    seen.wait_for_numbers([1], timeout=10)
    eventually(lambda: worker.is_healthy)


def test_a_worker_can_be_stopped_while_the_server_is_down(make_shop, server):
    shop = make_shop(urls=server.url)
    seen = shop.record("order.created", then=shop.hang)
    worker = shop.work(concurrency=1)
    shop.publish("order.created", 1, 2)
    seen.wait(1)
    server.kill()
    eventually(lambda: not worker.is_healthy)
    shop.released.set()
    assert worker.stop(timeout=10)


# --- dead letters


def test_a_message_is_kept_while_its_dead_letter_cannot_be_stored(make_shop):
    shop = make_shop(backoff=[0.1])
    settings = shop.settings
    full = StreamConfig(
        name=settings.dead_letter_stream,
        subjects=(f"{settings.env}.dlq.>",),
        max_msgs=1,
        discard="new",
    )
    other = NatsBroker(settings)  # sets nothing up by itself, so it cannot come second
    other.setup([full])
    other.close()

    def then(message, context):
        raise ValueError("broken")

    seen = shop.record("order.created", then=then, max_deliver=2)
    shop.work(concurrency=2)
    shop.publish("order.created", 1)
    (first,) = shop.wait_for_dead_letters(1)
    shop.publish("order.created", 2)
    # Over its limit and still there, though nothing can be stored.
    eventually(lambda: seen.numbers.count(2) == 2)
    eventually(lambda: shop.consumer().redelivered == 1)
    assert shop.consumer().ack_pending == 1
    assert [letter.id for letter in shop.dead_letters] == [first.id]

    assert shop.pubsub.dead_letters.discard(first)
    (second,) = shop.wait_for_dead_letters(1)
    shop.wait_until_settled()
    assert b'{"n":2}' in second.data
    assert Counter(seen.numbers)[1] == 2


def test_malformed_messages_wait_for_room_among_the_dead_letters_too(make_shop):
    shop = make_shop(backoff=[0.1])
    settings = shop.settings
    full = StreamConfig(
        name=settings.dead_letter_stream,
        subjects=(f"{settings.env}.dlq.>",),
        max_msgs=2,
        discard="new",
    )
    other = NatsBroker(settings)  # sets nothing up by itself, so it cannot come second
    other.setup([full])
    other.close()
    seen = shop.record("order.created")
    shop.work(concurrency=2)
    bodies = [b"{", b"[", b"?", b"!"]
    shop.publish_by_hand(*[("order.created", body, None) for body in bodies])
    shop.publish("order.created", 1)
    seen.wait(1)

    kept = []
    while len(kept) < 4:
        letters = shop.wait_for_dead_letters(2)
        kept += [letter.data for letter in letters]
        for letter in letters:
            assert shop.pubsub.dead_letters.discard(letter)
    shop.wait_until_settled()
    assert sorted(kept) == sorted(bodies)
    assert by_hand(settings.urls[0], _count(settings.dead_letter_stream)) == 0


def _count(stream):
    async def talk(client):
        return (await client.jetstream().stream_info(stream)).state.messages

    return talk
