"""What a user's type checker sees; checked by mypy, never run."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypedDict, assert_type

from flask import Blueprint, Flask

from flask_natspubsub import (
    Batch,
    DeadLetter,
    DeadLetterRecord,
    DeadLetters,
    Draft,
    MessageContext,
    NatsPubsub,
    PublishError,
    PublishReceipt,
    Relay,
    Retry,
    SentEvents,
    StoredAck,
    Subscriber,
    SubscriberGroup,
    Verification,
    Worker,
    current_message,
    current_trace_id,
)
from flask_natspubsub.testing import Published, TestBroker

app = Flask(__name__)
pubsub = NatsPubsub(app)
NatsPubsub().init_app(app, db=object())


@dataclass
class Order:
    order_id: int


class Payment(TypedDict):
    amount: int


def publishing() -> None:
    options: dict[str, Any] = {"event_id": "e", "occurred_at": dt.datetime.now(dt.UTC)}
    assert_type(pubsub.publish("order.created", Order(1), timeout=1.0), PublishReceipt)
    assert_type(pubsub.publish("order.created", {}, **options), PublishReceipt)
    assert_type(pubsub.publish(["a", "b"], {}), list[PublishReceipt])
    assert_type(pubsub.publish_event("a", "b", "c", {}), PublishReceipt)
    assert_type(pubsub.publish_many([("a", {}), ("b", {}, options)]), list[PublishReceipt])
    assert_type(pubsub.publish_nowait("a", {}), Future[PublishReceipt])
    with pubsub.batch() as batch:
        batch.publish("a", {})
    assert_type(batch, Batch)
    assert_type(batch.receipts, list[PublishReceipt])


async def publishing_in_async_code() -> None:
    assert_type(await pubsub.publish_async("a", {}), PublishReceipt)


def receipts(receipt: PublishReceipt, error: PublishError) -> None:
    assert_type(receipt.sequence, int | None)
    assert_type(receipt.duplicate, bool)
    if error.outcome == "unknown":
        assert_type(error.code, str)


@pubsub.subscriber("order.created", max_deliver=5, backoff=[1, dt.timedelta(seconds=5)])
def typed(message: Order, context: MessageContext) -> None:
    assert_type(context.attempt, int)
    assert_type(context.occurred_at, dt.datetime)
    raise Retry(delay=1.5)


@pubsub.subscriber(["order.created", "order.changed"], producer="*")
def without_context(message: Payment) -> int:
    return message["amount"]


@pubsub.subscriber("order.>")
async def asynchronous(message: dict[str, Any], context: MessageContext) -> None:
    assert_type(current_message.event_id, str)
    assert_type(current_trace_id(), str | None)


# A decorated handler keeps its type and can be called as before.
assert_type(without_context({"amount": 1}), int)


class Audit(Subscriber, pubsub=pubsub):
    topics = ("order.*", "payment.>")
    max_deliver = 10
    ack_wait = dt.timedelta(minutes=1)
    middleware = ()

    def handle(self, message: Order, context: MessageContext) -> None:
        raise DeadLetter("never")


group = SubscriberGroup("billing", prefix="order", max_deliver=3)
pubsub.register_group(group)


@group.subscriber("paid")
def paid(message: dict[str, Any]) -> None: ...


@pubsub.middleware
def around(context: MessageContext, call_next: Callable[..., Any]) -> Any:
    return call_next()


@pubsub.publish_middleware
def stamp(draft: Draft, call_next: Callable[..., Any]) -> Any:
    draft.headers = {**draft.headers, "x-region": "eu"}
    return call_next()


@pubsub.health_check("database", required=False)
def database() -> dict[str, Any]:
    return {"ok": True}


def running() -> None:
    with pubsub.run_worker(["audit"], relay=False, concurrency=2) as worker:
        assert_type(worker, Worker)
        assert_type(worker.is_healthy, bool)
    assert_type(worker.stop(timeout=1.0), bool)
    assert_type(pubsub.is_connected, bool)
    assert_type(pubsub.health_blueprint, Blueprint)
    assert_type(pubsub.dead_letters, DeadLetters)
    for record in pubsub.dead_letters:
        assert_type(record, DeadLetterRecord)
        assert_type(record.data, bytes)
        assert_type(pubsub.dead_letters.replay(record), StoredAck)
    assert_type(pubsub.make_relay(), Relay)
    assert_type(pubsub.make_relay().run_once(), int)
    assert_type(pubsub.sent_events, SentEvents)
    assert_type(pubsub.sent_events.verify(), Verification)
    pubsub.shutdown(app)


def testing() -> Iterator[TestBroker]:
    with TestBroker(app) as broker:
        assert_type(broker, TestBroker)
        assert_type(broker.assert_published("order.created", order_id=1), Published)
        assert_type(broker.published, list[Published])
        assert_type(broker.drain(), int)
        yield broker
