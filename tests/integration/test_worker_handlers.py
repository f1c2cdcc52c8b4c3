"""What surrounds a handler: types, context, lineage, middleware, sessions, signals, logs."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import logging
import re
from collections import Counter
from dataclasses import dataclass
from typing import TypedDict

import msgspec
import pydantic
import pytest
from flask import current_app, g
from flask_sqlalchemy import SQLAlchemy

from flask_natspubsub import (
    DeadLetter,
    current_message,
    message_dead_lettered,
    message_handled,
    message_received,
    message_retried,
    worker_started,
    worker_stopped,
)
from tests.support.waiting import eventually

from .shop import fail_until

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
    eventually(lambda: "a receiver of the signal 'message-handled' failed" in caplog.text)


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
