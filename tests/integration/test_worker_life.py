"""Threads and time: order, concurrency, long and hung handlers, starting and stopping."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest
from flask import Flask, current_app

from flask_natspubsub import NatsPubsub, TopologyError
from tests.support.waiting import eventually, for_seconds

from .shop import TIMEOUT, fail_until

pytestmark = pytest.mark.real_server


# --- order, number, time


def test_an_ordered_subscriber_keeps_the_order_also_over_failures(make_shop):
    shops = [make_shop(), make_shop()]
    order, lock = [], threading.Lock()

    def then(message, context):
        with lock:
            order.append((message["n"], context.attempt))
        if message["n"] % 7 == 0 and context.attempt < 3:
            raise ValueError("not yet")

    for shop in shops:
        shop.record("order.created", then=then, ordered=True)
        shop.work(concurrency=4)
    shops[0].publish("order.created", *range(40))

    shops[0].wait_until_settled()
    wanted = [(n, attempt) for n in range(40) for attempt in ([1, 2, 3] if n % 7 == 0 else [1])]
    assert order == wanted


def test_no_more_handlers_run_at_once_than_allowed(shop):
    running, most, lock = Counter(), Counter(), threading.Lock()

    def then(message, context):
        with lock:
            running[context.subscriber] += 1
            running["all"] += 1
            most[context.subscriber] = max(most[context.subscriber], running[context.subscriber])
            most["all"] = max(most["all"], running["all"])
        threading.Event().wait(0.02)
        with lock:
            running[context.subscriber] -= 1
            running["all"] -= 1

    shop.record("order.created", name="narrow", then=then, concurrency=2)
    shop.record("order.created", name="wide", then=then, concurrency=50)
    shop.work(concurrency=5)
    shop.publish("order.created", *range(60))

    shop.wait_until_settled("narrow", "wide")
    assert most["narrow"] == 2
    assert most["all"] == 5


def test_a_handler_five_times_as_long_as_ack_wait_is_called_once(shop):
    seen = shop.record("order.created", then=lambda *_: threading.Event().wait(5), ack_wait=1)
    shop.work(concurrency=2)
    shop.publish("order.created", 1)

    seen.wait(1)
    for_seconds(5, lambda: seen.wait(1))
    shop.wait_until_settled()
    seen.wait(1)


def test_slow_handlers_and_a_short_ack_wait_cause_no_redelivery(shop):
    """Prefetched messages would wait longer than ack_wait for their handler."""
    seen = shop.record("order.created", then=lambda *_: threading.Event().wait(1), ack_wait=1.5)
    shop.work(concurrency=8)
    shop.publish("order.created", *range(32))

    shop.wait_until_settled()
    assert Counter(seen.numbers) == Counter(range(32))
    assert {context.attempt for context in seen.contexts} == {1}


def test_slow_handlers_keep_all_threads_busy(shop):
    seen = shop.record("order.created", then=lambda *_: threading.Event().wait(0.2))
    shop.publish("order.created", *range(40))
    began = time.monotonic()
    shop.work(concurrency=8)
    seen.wait(40)
    shop.wait_until_settled()
    assert time.monotonic() - began < 2.2, "40 x 0.2 s on 8 threads are 1 s"


def test_hung_handlers_are_handed_back_and_their_threads_replaced(shop):
    def then(message, context):
        if message["n"] < 4:
            shop.hang()

    seen = shop.record("order.created", then=then, timeout=0.5, max_deliver=2)
    shop.work(concurrency=4)
    shop.publish("order.created", *range(4))
    seen.wait_for_numbers(range(4))
    shop.publish("order.created", *range(4, 30))

    seen.wait_for_numbers(range(30), timeout=10)
    letters = shop.wait_for_dead_letters(4)
    shop.wait_until_settled()
    assert {letter.reason for letter in letters} == {"handler_error"}
    assert all("longer than 0.5 s" in letter.error for letter in letters)
    assert Counter(seen.numbers) == Counter([*range(30), *range(4)])


def test_a_worker_with_hung_handlers_does_not_wait_for_them_at_its_end(shop):
    seen = shop.record("order.created", then=shop.hang, timeout=0.3, backoff=[60])
    worker = shop.work(concurrency=2)
    shop.publish("order.created", 1, 2)
    seen.wait(2)
    # Two more threads are there once the time of the first two ran out.
    eventually(lambda: worker._consumers[0].in_hand == 0)
    began = time.monotonic()
    assert worker.stop() is True
    assert time.monotonic() - began < 5


def test_a_hung_handler_does_not_block_a_message_that_must_run_alone(shop):
    """One over its limit runs when nothing else does; what hangs does not count as running."""

    def then(message, context):
        if message["n"] == 0:
            shop.hang()

    seen = shop.record("order.created", then=then, timeout=1.5, max_deliver=1, concurrency=3)
    shop.work().stop()

    async def use_up(client):
        """Take message 1 and give it back, so that its deliveries are over the limit."""
        stream = client.jetstream()
        pull = await stream.pull_subscribe_bind(durable="shop-mailer", stream=shop.settings.stream)
        for delay in (None, 0.5):
            (message,) = await pull.fetch(1)
            await message.nak(delay)

    shop.publish("order.created", 1)
    shop.by_hand(use_up)
    shop.work()
    shop.publish("order.created", 0)
    seen.wait_for_numbers([0])
    assert seen.numbers == [0]
    shop.publish("order.created", *range(2, 20))

    seen.wait_for_numbers(range(20), timeout=10)
    assert len(shop.wait_for_dead_letters(1)) == 1
    shop.wait_until_settled()
    assert Counter(seen.numbers) == Counter(range(20))


# --- the life of a worker


def test_stopping_finishes_what_has_begun_and_hands_back_the_rest(make_shop):
    first, second = make_shop(), make_shop()
    began, may_end = threading.Semaphore(0), threading.Event()

    def then(message, context):
        began.release()
        may_end.wait(TIMEOUT)

    slow = first.record("order.created", then=then)
    quick = second.record("order.created")
    worker = first.work(concurrency=2)
    first.publish("order.created", *range(10))
    for _ in range(2):
        assert began.acquire(timeout=TIMEOUT)
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    eventually(lambda: not worker.is_healthy)
    second.work()
    # Long before ack_wait is over, which is 30 s.
    quick.wait(8, timeout=10)
    may_end.set()
    stopping.join(TIMEOUT)
    second.wait_until_settled(timeout=5)

    assert sorted(slow.numbers + quick.numbers) == list(range(10))
    assert not worker.is_healthy


def test_stopping_and_starting_under_load_loses_and_repeats_nothing(shop):
    seen = shop.record("order.created", then=lambda *_: threading.Event().wait(0.002))
    shop.publish("order.created", *range(800))
    for calls in (100, 200, 300, 400):
        worker = shop.work(concurrency=4)
        eventually(lambda calls=calls: len(seen.calls) >= calls)
        assert worker.stop()
    shop.work(concurrency=4)
    seen.wait_for_numbers(range(800))
    shop.wait_until_settled(timeout=5)
    assert Counter(seen.numbers) == Counter(range(800))


def test_a_worker_that_cannot_wait_leaves_its_messages_to_others(make_shop):
    shop = make_shop(ack_wait=1)
    seen = shop.record("order.created", then=lambda m, c: c.attempt == 1 and shop.hang())
    worker = shop.work(concurrency=1)
    shop.publish("order.created", 1)
    seen.wait(1)
    assert worker.stop(timeout=0.1) is False
    worker.hand_back_all()
    shop.work()
    seen.wait(2)
    shop.wait_until_settled()


def test_a_handler_may_stop_its_own_worker(shop):
    stopped = []
    shop.record("order.created", then=lambda *_: stopped.append(worker.stop()))
    worker = shop.work()
    shop.publish("order.created", 1)
    eventually(lambda: stopped == [True])
    shop.wait_until_settled()


def test_a_worker_is_started_once(shop):
    shop.record("order.created")
    worker = shop.work()
    with pytest.raises(RuntimeError, match="started once"):
        worker.start()
    worker.stop()
    assert worker.stop() is True


def test_a_worker_that_cannot_start_leaves_nothing_running(shop):
    shop.record("order.created", name="fine")
    shop.record(subject="elsewhere.>", name="lost")
    before = threading.active_count()
    with pytest.raises(TopologyError):
        shop.work(concurrency=5)
    assert threading.active_count() <= before + 1  # the broker's own


def test_a_worker_is_a_context_manager(shop):
    seen = shop.record("order.created")
    with shop.pubsub.run_worker() as worker:
        eventually(lambda: worker.is_healthy)
        shop.publish("order.created", 1)
        seen.wait(1)
    assert not worker.is_healthy


def test_waiting_until_idle_includes_what_handlers_publish(shop):
    def then(message, context):
        if message["n"]:
            shop.publish("order.created", message["n"] - 1)

    seen = shop.record("order.created", then=then)
    failing = shop.record("order.>", name="failing", then=fail_until(2))
    shop.publish("order.created", 10)
    worker = shop.work()
    worker.wait_until_idle()
    assert seen.numbers == list(range(10, -1, -1))
    assert len(failing.calls) == 22


def test_an_extension_object_serves_two_apps_at_once(make_shop, nats_server, env):
    pubsub = NatsPubsub()
    apps = []
    for name in ("shop", "billing"):
        app = Flask(name)
        app.config.update(NATSPUBSUB_URLS=nats_server.url, NATSPUBSUB_ENV=env)
        pubsub.init_app(app)
        apps.append(app)
    seen = []

    @pubsub.subscriber("order.created")
    def note(message):
        seen.append((current_app.name, message["n"]))

    workers = []
    for number, app in enumerate(apps):
        with app.app_context():
            workers.append(pubsub.run_worker())
            pubsub.publish("order.created", {"n": number})
    eventually(lambda: sorted(seen) == [("billing", 1), ("shop", 0)])
    for worker in workers:
        worker.stop()
    pubsub.shutdown()
