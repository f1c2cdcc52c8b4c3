"""The worker on a real server: from a message in the stream to what became of it."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import json
import logging
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TypedDict

import msgspec
import pydantic
import pytest
from flask import Flask, current_app, g
from flask_sqlalchemy import SQLAlchemy

from flask_natspubsub import (
    DeadLetter,
    Discard,
    NatsPubsub,
    Retry,
    TopologyError,
    current_message,
    message_dead_lettered,
    message_handled,
    message_received,
    message_retried,
    worker_started,
    worker_stopped,
)
from tests.waiting import eventually, for_seconds

from .shop import TIMEOUT

pytestmark = pytest.mark.real_server


@dataclass
class DataclassOrder:
    n: int
    at: dt.datetime | None = None


class StructOrder(msgspec.Struct):
    n: int
    at: dt.datetime | None = None


class DictOrder(TypedDict):
    n: int


class PydanticOrder(pydantic.BaseModel):
    n: int
    at: dt.datetime | None = None


def fail_until(attempt, error=ValueError):
    """Make a ``then`` that fails before delivery number ``attempt``."""

    def then(message, context):
        if context.attempt < attempt:
            raise error("not yet")

    return then


# --- one message


def test_messages_are_handled_once_and_acked(shop):
    seen = shop.record("order.created")
    shop.work()
    shop.publish("order.created", *range(50))

    seen.wait(50)
    shop.wait_until_settled()
    assert sorted(seen.numbers) == list(range(50))
    assert {context.attempt for context in seen.contexts} == {1}
    assert shop.dead_letters == []


def test_what_was_published_before_the_first_worker_is_handled_too(shop):
    seen = shop.record("order.created")
    shop.publish("order.created", 1, 2)
    shop.work()
    seen.wait(2)


def test_a_subscriber_for_new_messages_gets_no_old_ones(shop):
    seen = shop.record("order.created", deliver_policy="new")
    shop.publish("order.created", 1)
    shop.work()
    shop.publish("order.created", 2)
    seen.wait(1)
    shop.wait_until_settled()
    assert seen.numbers == [2]


def test_a_failed_message_comes_again_after_each_wait_of_the_backoff(shop):
    times = []

    def then(message, context):
        times.append(time.monotonic())
        fail_until(4)(message, context)

    seen = shop.record("order.created", then=then, backoff=[0.1, 0.5])
    shop.work()
    shop.publish("order.created", 1)

    seen.wait(4)
    shop.wait_until_settled()
    assert [context.attempt for context in seen.contexts] == [1, 2, 3, 4]
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    for wait, asked in zip(waits, [0.1, 0.5, 0.5], strict=True):
        assert asked * 0.8 <= wait < asked * 1.2 + 2
    assert shop.dead_letters == []


def test_a_handler_says_when_it_wants_its_message_again(shop):
    times = []

    def then(message, context):
        times.append(time.monotonic())
        if context.attempt == 1:
            raise Retry(0.5)
        if context.attempt == 2:
            raise Retry(delay=dt.timedelta(seconds=0.2))

    seen = shop.record("order.created", then=then, backoff=[30])
    shop.work()
    shop.publish("order.created", 1)

    seen.wait(3)
    assert times[1] - times[0] >= 0.5
    assert times[2] - times[1] >= 0.2
    shop.wait_until_settled()


def test_a_discarded_message_is_gone(shop):
    def then(message, context):
        raise Discard("not for us")

    seen = shop.record("order.created", then=then)
    shop.work()
    shop.publish("order.created", 1)

    seen.wait(1)
    shop.wait_until_settled()
    assert shop.dead_letters == []


def test_a_handler_gives_a_message_up_at_once(shop):
    def then(message, context):
        raise DeadLetter("no such customer")

    seen = shop.record("order.created", then=then)
    shop.work()
    receipt = shop.pubsub.publish("order.created", {"n": 1}, trace_id="t1")

    (letter,) = shop.wait_for_dead_letters(1)
    shop.wait_until_settled()
    seen.wait(1)
    assert (letter.subscriber, letter.topic) == ("mailer", "order.created")
    assert (letter.reason, letter.error) == ("rejected", "DeadLetter: no such customer")
    assert (letter.event_id, letter.trace_id) == (receipt.event_id, "t1")
    assert (letter.original_stream, letter.original_sequence) == (receipt.stream, receipt.sequence)


def test_a_message_that_always_fails_ends_as_a_dead_letter(shop):
    seen = shop.record("order.created", then=fail_until(99), max_deliver=3)
    shop.work()
    shop.publish("order.created", 1)

    (letter,) = shop.wait_for_dead_letters(1)
    shop.wait_until_settled()
    assert [context.attempt for context in seen.contexts] == [1, 2, 3]
    assert (letter.reason, letter.deliveries) == ("handler_error", 3)
    assert letter.error == "ValueError: not yet"
    assert json.loads(letter.data)["message"] == {"n": 1}


def test_without_dead_letters_a_failed_message_is_just_dropped(shop):
    seen = shop.record("order.created", then=fail_until(99), max_deliver=2, dead_letter=False)
    shop.work()
    shop.publish("order.created", 1)
    seen.wait(2)
    shop.wait_until_settled()
    assert shop.dead_letters == []


def test_good_messages_flow_while_bad_ones_are_retried(shop):
    def then(message, context):
        if message["n"] % 10 == 0:
            raise ValueError("every tenth")

    seen = shop.record("order.created", then=then, backoff=[0.5], max_deliver=2)
    shop.work(concurrency=4)
    shop.publish("order.created", *range(300))
    letters = shop.wait_for_dead_letters(30)

    shop.wait_until_settled()
    assert Counter(seen.numbers) == Counter(list(range(300)) + list(range(0, 300, 10)))
    assert sorted(json.loads(one.data)["message"]["n"] for one in letters) == list(
        range(0, 300, 10)
    )


# --- what a handler is given


@pytest.mark.parametrize(
    "kind", [DataclassOrder, StructOrder, DictOrder, PydanticOrder, dict], ids=lambda k: k.__name__
)
def test_a_message_is_decoded_into_the_annotated_type(shop, kind):
    seen = []

    def handler(message):
        seen.append(message)

    handler.__annotations__["message"] = kind
    shop.subscriber("order.created")(handler)
    shop.work()
    shop.publish("order.created", 5)

    eventually(lambda: seen)
    shop.wait_until_settled("handler")
    assert seen == [kind(n=5)]
    assert type(seen[0]) is (dict if kind is DictOrder else kind)


@pytest.mark.parametrize("kind", [DataclassOrder, StructOrder, DictOrder, PydanticOrder])
def test_a_message_of_another_form_is_a_dead_letter_at_once(shop, kind):
    def handler(message):
        raise AssertionError("the handler ran")

    handler.__annotations__["message"] = kind
    shop.subscriber("order.created")(handler)
    shop.work()
    shop.pubsub.publish("order.created", {"n": "five"})

    (letter,) = shop.wait_for_dead_letters(1)
    assert (letter.reason, letter.deliveries) == ("schema", 1)
    assert kind.__name__ in letter.error


def test_the_context_is_that_of_the_message_and_current_message_is_the_same(shop):
    same = []

    def then(message, context):
        same.append(current_message._get_current_object() is context)
        assert current_app.name == "shop"

    seen = shop.record("order.created", then=then)
    shop.work()
    before = dt.datetime.now(dt.UTC)
    occurred = dt.datetime(2025, 1, 2, 3, 4, 5, 678000, dt.UTC)
    receipt = shop.pubsub.publish(
        "order.created", {"n": 1}, trace_id="t1", occurred_at=occurred, headers={"x-shop": "7"}
    )

    seen.wait(1)
    (context,) = seen.contexts
    assert same == [True]
    assert (context.event_id, context.topic) == (receipt.event_id, "order.created")
    assert (context.subject, context.stream) == (receipt.subject, receipt.stream)
    assert context.sequence == receipt.sequence
    assert (context.trace_id, context.producer, context.attempt) == ("t1", "shop", 1)
    assert context.occurred_at == occurred
    assert abs(context.published_at - before) < dt.timedelta(minutes=1)
    assert context.headers["x-shop"] == "7"
    assert json.loads(context.raw) == context.envelope
    assert context.subscriber == "mailer"


def test_async_handlers_run_side_by_side_with_the_context_of_their_message(shop):
    seen, meeting, all_here = [], [], asyncio.Event()

    @shop.subscriber("order.created", concurrency=3)
    async def handler(message, context):
        meeting.append(message["n"])
        if len(meeting) == 3:
            all_here.set()
        await all_here.wait()  # only side by side can this come to an end
        seen.append((message["n"], current_message.event_id == context.event_id, g.get("n")))
        g.n = message["n"]

    shop.work()
    shop.publish("order.created", 1, 2, 3)
    eventually(lambda: len(seen) == 3)
    shop.wait_until_settled("handler")
    assert sorted(seen) == [(1, True, None), (2, True, None), (3, True, None)]


def test_an_async_handler_out_of_time_is_cancelled_and_comes_again(shop):
    seen, cancelled = [], []

    @shop.subscriber("order.created", timeout=0.3, backoff=[0.05])
    async def handler(message, context):
        seen.append(context.attempt)
        if context.attempt == 1:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(message)
                raise

    shop.work()
    shop.publish("order.created", 1)
    eventually(lambda: seen == [1, 2] and cancelled)
    shop.wait_until_settled("handler")


def test_a_timeout_of_its_own_is_an_async_handlers_error_like_any_other(shop):
    @shop.subscriber("order.created", max_deliver=1)
    async def handler(message):
        raise TimeoutError("the bank did not answer")

    shop.work()
    shop.publish("order.created", 1)
    (letter,) = shop.wait_for_dead_letters(1)
    assert letter.error == "TimeoutError: the bank did not answer"


def test_middleware_is_wrapped_around_handlers_in_order(shop):
    calls = []

    def around(name):
        def middleware(context, call_next):
            calls.append(f"{name} before {context.topic}")
            call_next()
            calls.append(f"{name} after")

        return middleware

    shop.pubsub.middleware(around("all"))
    shop.record(
        "order.created", then=lambda *_: calls.append("handler"), middleware=[around("own")]
    )
    shop.work()
    shop.publish("order.created", 1)
    shop.wait_until_settled()
    assert calls == [
        "all before order.created",
        "own before order.created",
        "handler",
        "own after",
        "all after",
    ]


def test_what_a_handler_publishes_inherits_where_it_comes_from(shop):
    def then(message, context):
        shop.pubsub.publish("order.paid", message)

    first = shop.record("order.created", name="first", then=then)
    second = shop.record("order.paid", name="second")
    shop.work()
    traceparent = "00-11112222333344445555666677778888-1111222233334444-01"
    body = {
        "event_id": "e1",
        "topic": "order.created",
        "trace_id": "t1",
        "correlation_id": "c1",
        "message": {"n": 1},
    }
    shop.publish_by_hand(("order.created", json.dumps(body).encode(), {"traceparent": traceparent}))

    second.wait(1)
    (cause,), (effect,) = first.contexts, second.contexts
    assert (effect.trace_id, effect.correlation_id, effect.causation_id) == ("t1", "c1", "e1")
    assert effect.headers["traceparent"] == traceparent
    assert effect.event_id != cause.event_id


# --- which messages


def test_wildcards_choose_by_token(shop):
    one = shop.record("order.*", name="one")
    rest = shop.record("order.>", name="rest")
    exact = shop.record("order.created", "order.item.added", name="exact")
    shop.work()
    topics = ["order.created", "order.item.added", "order", "payment.order.created"]
    for number, topic in enumerate(topics):
        shop.publish(topic, number)

    shop.wait_until_settled("one", "rest", "exact")
    assert one.numbers == [0]
    assert sorted(rest.numbers) == [0, 1]
    assert sorted(exact.numbers) == [0, 1]


def test_events_of_another_app_and_of_all_apps(make_shop):
    shop, billing = make_shop(), make_shop("billing")
    own = shop.record("invoice.sent", name="own")
    theirs = shop.record("invoice.sent", name="theirs", producer="billing")
    everybodys = shop.record("invoice.sent", name="everybodys", producer="*")
    shop.work()
    shop.publish("invoice.sent", 1)
    billing.publish("invoice.sent", 2)

    shop.wait_until_settled("own", "theirs", "everybodys")
    assert own.numbers == [1]
    assert theirs.numbers == [2]
    assert sorted(everybodys.numbers) == [1, 2]
    assert [context.producer for context in theirs.contexts] == ["billing"]


def test_a_raw_subject(shop):
    seen = shop.record(subject=f"{shop.settings.env}.events.*.done")
    shop.work()
    shop.publish_by_hand(
        (f".{shop.settings.env}.events.job.done", b'{"message":{"n":1}}', None),
        (f".{shop.settings.env}.events.job.begun", b'{"message":{"n":2}}', None),
    )
    seen.wait(1)
    shop.wait_until_settled()
    assert seen.numbers == [1]
    assert seen.contexts[0].topic == "job.done"


def test_a_subject_that_no_stream_stores_is_refused(shop):
    shop.record(subject="elsewhere.>")
    with pytest.raises(TopologyError, match=r"'elsewhere\.>'"):
        shop.work()


def test_two_subscribers_each_get_every_message(shop):
    one = shop.record("order.created", name="one")
    two = shop.record("order.created", name="two", then=fail_until(2))
    shop.work()
    shop.publish("order.created", *range(20))

    shop.wait_until_settled("one", "two")
    assert sorted(one.numbers) == list(range(20))
    assert Counter(two.numbers) == Counter(list(range(20)) * 2)


def test_a_worker_may_run_some_subscribers_only(shop):
    one = shop.record("order.created", name="one")
    two = shop.record("order.created", name="two")
    worker = shop.work(only=["two"])
    shop.publish("order.created", 1)

    shop.wait_until_settled("two")
    assert worker.subscribers == ["two"]
    assert (one.numbers, two.numbers) == ([], [1])


def test_two_workers_share_the_load(make_shop):
    shops = [make_shop(), make_shop()]
    seen = [
        shop.record("order.created", then=lambda *_: threading.Event().wait(0.005))
        for shop in shops
    ]
    for shop in shops:
        shop.work(concurrency=2)
    shops[0].publish("order.created", *range(300))

    shops[0].wait_until_settled()
    assert Counter(seen[0].numbers + seen[1].numbers) == Counter(range(300))
    assert min(len(one.calls) for one in seen) > 50


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


# --- the application around a handler


def test_each_message_has_its_own_app_context_and_session(make_shop, tmp_path):
    shop = make_shop()
    db = SQLAlchemy()
    shop.app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'shop.db'}"
    db.init_app(shop.app)

    class Order(db.Model):
        id = db.Column(db.Integer, primary_key=True)

    with shop.app.app_context():
        db.create_all()
        engine = db.engine
    found = []

    def then(message, context):
        found.append((g.get("n"), len(db.session.new), db.session().in_transaction()))
        g.n = message["n"]
        db.session.add(Order(id=message["n"]))
        if message["n"] % 2:
            db.session.flush()
            raise DeadLetter("leaves a transaction open")
        db.session.commit()

    shop.record("order.created", then=then)
    torn_down = []
    shop.app.teardown_appcontext(lambda error: torn_down.append(g.get("n")))
    shop.work(concurrency=1)
    shop.publish("order.created", *range(10))
    shop.wait_until_settled()

    assert found == [(None, 0, False)] * 10
    assert torn_down == list(range(10))
    with shop.app.app_context():
        ids = db.session.scalars(db.select(Order.id).order_by(Order.id)).all()
    assert ids == [0, 2, 4, 6, 8], "what was not committed must be rolled back"
    engine.dispose()


def test_signals_tell_what_a_worker_does(shop):
    told = []
    signals = [
        message_received,
        message_handled,
        message_retried,
        message_dead_lettered,
        worker_started,
        worker_stopped,
    ]
    receivers = []
    for signal in signals:

        def receive(sender, signal=signal, **arguments):
            assert sender is shop.app
            told.append(signal.name)

        receivers.append(receive)  # kept alive: signals hold them weakly
        signal.connect(receive, shop.app)
    shop.record("order.created", then=fail_until(2))
    shop.record("order.paid", name="refuser", then=fail_until(99, DeadLetter))
    worker = shop.work()
    shop.publish("order.created", 1)
    shop.publish("order.paid", 1)
    shop.wait_until_settled("mailer", "refuser")
    worker.stop()

    assert Counter(told) == Counter(
        {
            "worker-started": 1,
            "worker-stopped": 1,
            "message-received": 3,
            "message-retried": 1,
            "message-handled": 1,
            "message-dead-lettered": 1,
        }
    )
    assert (told[0], told[-1]) == ("worker-started", "worker-stopped")


def test_a_receiver_that_fails_changes_nothing_for_the_message(shop, caplog):
    def receive(sender, **arguments):
        raise RuntimeError("a broken receiver")

    for signal in (message_received, message_handled):
        signal.connect(receive, shop.app)
    seen = shop.record("order.created")
    shop.work()
    shop.publish("order.created", 1)
    seen.wait(1)
    shop.wait_until_settled()
    assert "a receiver of the signal 'message-handled' failed" in caplog.text


def test_there_is_one_log_line_for_each_message(shop, caplog):
    caplog.set_level(logging.INFO, "flask_natspubsub.worker")

    def then(message, context):
        if message["n"] == 2:
            raise ValueError("broken")

    shop.record("order.created", then=then, max_deliver=2)
    shop.work()
    ids = {n: shop.pubsub.publish("order.created", {"n": n}).event_id[-8:] for n in (1, 2)}
    shop.wait_for_dead_letters(1)
    shop.wait_until_settled()

    def lines():
        return sorted(record.getMessage() for record in caplog.records if hasattr(record, "result"))

    eventually(lambda: len(lines()) == 3)
    number = r"\d+\.\d ms"
    expected = sorted(
        [
            rf"order\.created {ids[1]} mailer #1 {number} handled",
            rf"order\.created {ids[2]} mailer #1 {number} retried: ValueError: broken; "
            rf"again in 0\.0\d+ s",
            rf"order\.created {ids[2]} mailer #2 {number} dead_lettered: "
            rf"handler_error: ValueError: broken",
        ]
    )
    for line, pattern in zip(lines(), expected, strict=True):
        assert re.fullmatch(pattern, line), line


# --- written by others


def test_a_message_of_the_javascript_package_reaches_the_handler(shop):
    seen = shop.record("order.created")
    shop.work()
    body = (
        '{"event_id":"0b5e1f6a-2222-4d2e-8a8e-1234567890ab","schema_version":1,'
        '"topic":"order.created","message_type":"OrderCreated","producer":"web",'
        '"occurred_at":"2025-01-02T03:04:05.678Z","trace_id":"trace-abc",'
        '"message":{"n":1,"name":"Zoë","note":null}}'
    ).encode()
    headers = {
        "topic": "order.created",
        "trace_id": "trace-abc",
        "Nats-Msg-Id": "0b5e1f6a-2222-4d2e-8a8e-1234567890ab",
    }
    shop.publish_by_hand(("order.created", body, headers))

    seen.wait(1)
    ((message, context),) = seen.calls
    assert message == {"n": 1, "name": "Zoë", "note": None}
    assert context.event_id == "0b5e1f6a-2222-4d2e-8a8e-1234567890ab"
    assert (context.producer, context.trace_id) == ("web", "trace-abc")
    assert context.occurred_at == dt.datetime(2025, 1, 2, 3, 4, 5, 678000, dt.UTC)
    assert context.raw == body


def test_a_message_of_the_ruby_package_reaches_the_handler(shop):
    seen = shop.record("order.order.created")
    shop.work()
    body = json.dumps(
        {
            "event_id": "11111111-2222-4d2e-8a8e-1234567890ab",
            "schema_version": 1,
            "domain": "order",
            "resource": "order",
            "action": "created",
            "producer": "web",
            "resource_id": 42,
            "occurred_at": "2025-01-02T03:04:05Z",
            "trace_id": "trace-abc",
            "payload": {"n": 42},
        }
    ).encode()
    shop.publish_by_hand(
        ("order.order.created", body, {"nats-msg-id": "11111111-2222-4d2e-8a8e-1234567890ab"})
    )

    seen.wait(1)
    ((message, context),) = seen.calls
    assert message == {"n": 42}
    assert context.topic == "order.order.created"
    assert context.event_id == "11111111-2222-4d2e-8a8e-1234567890ab"
    assert context.envelope["resource_id"] == 42
    assert context.occurred_at == dt.datetime(2025, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


def test_a_message_without_any_id_is_known_by_its_place(shop):
    seen = shop.record("order.created")
    shop.work()
    shop.publish_by_hand(("order.created", b'{"message":{"n":1}}', None))
    seen.wait(1)
    (context,) = seen.contexts
    assert context.event_id == f"{context.stream}:{context.sequence}"
    assert context.topic == "order.created"


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
