"""Publishing, from the call to the stored message, on the broker in memory."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import json
import uuid
from typing import Any

import msgspec
import pytest
from flask import Flask

from flask_natspubsub import (
    CircuitOpen,
    ConfigurationError,
    Draft,
    EncodingError,
    InvalidTopic,
    NatsPubsub,
    NoStreamForSubject,
    NotConnected,
    PartlyPublished,
    PayloadTooLarge,
    PublishError,
    PublishReceipt,
    message_published,
)
from flask_natspubsub.brokers.base import Ticket
from flask_natspubsub.brokers.memory.broker import MemoryBroker
from flask_natspubsub.messages.envelope import Lineage
from flask_natspubsub.messages.message import Message, StoredMessage
from flask_natspubsub.observability.tracing import within
from tests.conftest import MakePubsub


@pytest.fixture
def pubsub(make_pubsub: MakePubsub) -> NatsPubsub:
    return make_pubsub(urls="memory://", env="test")


@pytest.fixture
def broker(pubsub: NatsPubsub) -> MemoryBroker:
    made = pubsub.state().broker()
    assert isinstance(made, MemoryBroker)
    return made


def stored(pubsub: NatsPubsub) -> list[StoredMessage]:
    return list(pubsub.state().broker().messages("test-events-stream"))


def envelope(message: StoredMessage) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(message.data)
    return decoded


@dataclasses.dataclass
class OrderPlaced:
    id: int
    item: str = "tea"


class Invoice(msgspec.Struct):
    id: str


# --- one message


def test_a_published_message_is_stored_and_the_receipt_says_where(pubsub: NatsPubsub) -> None:
    receipt = pubsub.publish("order.created", {"order_id": 1})

    (message,) = stored(pubsub)
    assert receipt == PublishReceipt(
        event_id=envelope(message)["event_id"],
        topic="order.created",
        subject="test.shop.order.created",
        stream="test-events-stream",
        sequence=1,
        duplicate=False,
        status="stored",
    )
    assert uuid.UUID(receipt.event_id).version == 7
    assert message.subject == receipt.subject


def test_everything_a_caller_can_give_is_on_the_wire(pubsub: NatsPubsub) -> None:
    pubsub.publish(
        "Order Created",
        {"größe": [1, None]},
        event_id="e1",
        trace_id="t1",
        occurred_at=dt.datetime(2025, 1, 2, 3, 4, 5, 678_999, dt.timezone(dt.timedelta(hours=1))),
        correlation_id="c1",
        causation_id="c0",
        message_type="Made",
        headers={"tenant": "a"},
    )

    (message,) = stored(pubsub)
    assert message.subject == "test.shop.order_created"
    assert (
        message.data
        == (
            '{"event_id":"e1","schema_version":1,"topic":"Order Created","message_type":"Made",'
            '"producer":"shop","occurred_at":"2025-01-02T02:04:05.678Z","trace_id":"t1",'
            '"message":{"größe":[1,null]},"correlation_id":"c1","causation_id":"c0"}'
        ).encode()
    )
    assert list(message.headers.items()) == [
        ("topic", "Order Created"),
        ("trace_id", "t1"),
        ("Nats-Msg-Id", "e1"),
        ("tenant", "a"),
    ]


def test_the_same_event_id_again_is_a_duplicate(pubsub: NatsPubsub) -> None:
    first = pubsub.publish("order.created", {}, event_id="e1")
    again = pubsub.publish("order.created", {}, event_id="e1")

    assert (first.duplicate, again.duplicate) == (False, True)
    assert again.sequence == first.sequence
    assert len(stored(pubsub)) == 1


@pytest.mark.parametrize(
    ("message", "name"), [(OrderPlaced(1), "OrderPlaced"), (Invoice("a"), "Invoice"), ({}, None)]
)
def test_a_typed_message_tells_its_type(pubsub: NatsPubsub, message: Any, name: str | None) -> None:
    pubsub.publish("order.created", message)

    assert envelope(stored(pubsub)[0]).get("message_type") == name


def test_a_message_inherits_the_ids_in_force_unless_it_has_its_own(pubsub: NatsPubsub) -> None:
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    with within(Lineage("t1", "c1", "e0", parent)):
        pubsub.publish("a", {})
        pubsub.publish("b", {}, trace_id="t2", correlation_id="c2", causation_id="e9")
    pubsub.publish("c", {})

    inherited, own, without = stored(pubsub)
    assert inherited.headers["traceparent"] == parent
    ids = ("trace_id", "correlation_id", "causation_id")
    assert [envelope(inherited)[key] for key in ids] == ["t1", "c1", "e0"]
    assert [envelope(own)[key] for key in ids] == ["t2", "c2", "e9"]
    assert not set(ids) & set(envelope(without))
    assert "traceparent" not in without.headers


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "options", "error", "path"),
    [
        (("", {}), {}, InvalidTopic, None),
        (("a..b", {}), {}, InvalidTopic, None),
        (("order.*", {}), {}, InvalidTopic, None),
        ((5, {}), {}, InvalidTopic, None),
        ((["a", "b."], {}), {}, InvalidTopic, None),
        (([], {}), {}, InvalidTopic, None),
        (("a", [1]), {}, EncodingError, "$"),
        (("a", None), {}, EncodingError, "$"),
        (("a", {"x": [1, {"y": b""}]}), {}, EncodingError, "$.x[1].y"),
        (("a", {"x": float("nan")}), {}, EncodingError, "$.x"),
        (("a", {}), {"event_id": ""}, EncodingError, "event_id"),
        (("a", {}), {"event_id": "a b"}, EncodingError, "event_id"),
        (("a", {}), {"event_id": 7}, EncodingError, "event_id"),
        (("a", {}), {"trace_id": "a\r\nb: c"}, EncodingError, "trace_id"),
        (("a", {}), {"trace_id": "x" * 300}, EncodingError, "trace_id"),
        (("a", {}), {"correlation_id": "ü"}, EncodingError, "correlation_id"),
        (("a", {}), {"occurred_at": dt.datetime(2025, 1, 1)}, EncodingError, "occurred_at"),
        (("a", {}), {"headers": {"Nats-X": "1"}}, EncodingError, "headers.Nats-X"),
        (("a", {}), {"headers": {"x": "a\r\nb: c"}}, EncodingError, "headers.x"),
    ],
)
def test_what_cannot_be_sent_is_refused_where_it_is_said(
    pubsub: NatsPubsub,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    path: str | None,
) -> None:
    with pytest.raises(error) as caught:
        pubsub.publish(*arguments, **options)

    assert getattr(caught.value, "path", None) == path
    assert stored(pubsub) == []


def test_a_misspelt_option_is_a_type_error(pubsub: NatsPubsub) -> None:
    for call in (
        lambda: pubsub.publish("a", {}, event="x", evnt_id="e1"),
        lambda: pubsub.publish_nowait("a", {}, evnt_id="e1"),
        lambda: pubsub.publish_many([("a", {}, {"evnt_id": "e1"})]),
    ):
        with pytest.raises(TypeError, match="'evnt_id'"):
            call()


def test_a_message_that_is_too_large_is_refused_with_its_size(pubsub: NatsPubsub) -> None:
    with pytest.raises(PayloadTooLarge) as caught:
        pubsub.publish("a", {"x": "y" * 1024 * 1024})

    assert caught.value.limit == 1024 * 1024
    assert caught.value.size > caught.value.limit
    assert caught.value.outcome == "not_sent"


# --- the event form


@pytest.mark.parametrize(
    ("message", "resource_id"),
    [
        ({"id": 7}, 7),
        ({"id": "a-7"}, "a-7"),
        ({"id": 0}, None),
        ({"id": None}, None),
        ({}, None),
        (OrderPlaced(7), 7),
        (Invoice("a-7"), "a-7"),
    ],
)
def test_the_event_form_has_four_more_keys(
    pubsub: NatsPubsub, message: Any, resource_id: Any
) -> None:
    receipt = pubsub.publish_event("shop", "order", "placed", message, event_id="e1")

    sent = envelope(stored(pubsub)[0])
    assert receipt.topic == sent["topic"] == "shop.order.placed"
    assert (sent["domain"], sent["resource"], sent["action"]) == ("shop", "order", "placed")
    assert sent.get("resource_id") == resource_id
    assert ("resource_id" in sent) is (resource_id is not None)
    keys = list(sent)
    assert keys[keys.index("message") + 1 :][:3] == ["domain", "resource", "action"]


# --- several topics


def test_a_list_of_topics_is_a_message_for_each(pubsub: NatsPubsub) -> None:
    receipts = pubsub.publish(["user.created", "notification.email"], {"id": 1})

    assert [receipt.topic for receipt in receipts] == ["user.created", "notification.email"]
    assert len({receipt.event_id for receipt in receipts}) == 2
    assert [message.sequence for message in stored(pubsub)] == [1, 2]


def test_ids_after_a_given_one_are_derived_from_it(pubsub: NatsPubsub) -> None:
    first = pubsub.publish(["a", "b", "c"], {}, event_id="e1")
    again = pubsub.publish(["a", "b", "c"], {}, event_id="e1")
    other = pubsub.publish(("a", "b", "c"), {}, event_id="e2")

    assert first[0].event_id == "e1"
    assert [uuid.UUID(receipt.event_id).version for receipt in first[1:]] == [5, 5]
    assert [r.event_id for r in again] == [r.event_id for r in first]
    assert all(receipt.duplicate for receipt in again)
    assert not {r.event_id for r in other} & {r.event_id for r in first}
    assert len(stored(pubsub)) == 6


# --- many


def test_publish_many_keeps_the_order_and_takes_options(pubsub: NatsPubsub) -> None:
    receipts = pubsub.publish_many(
        (("a", {"n": 1}), ("b", {"n": 2}, {"event_id": "e2", "trace_id": "t"}), ["c", {"n": 3}])
    )

    assert [receipt.sequence for receipt in receipts] == [1, 2, 3]
    assert receipts[1].event_id == "e2"
    assert [envelope(message)["message"]["n"] for message in stored(pubsub)] == [1, 2, 3]
    assert envelope(stored(pubsub)[1])["trace_id"] == "t"


def test_publishing_nothing_is_nothing(pubsub: NatsPubsub) -> None:
    assert pubsub.publish_many([]) == []


def test_of_many_nothing_is_sent_if_one_cannot_be_encoded(pubsub: NatsPubsub) -> None:
    with pytest.raises(EncodingError):
        pubsub.publish_many([("a", {}), ("b", {"x": b""})])

    assert stored(pubsub) == []


def test_a_batch_is_sent_at_the_end_of_its_block(pubsub: NatsPubsub) -> None:
    with pubsub.batch() as batch:
        batch.publish("a", {"n": 1})
        batch.publish(["b", "c"], {"n": 2}, event_id="e1")
        assert stored(pubsub) == []
        assert len(batch) == 3
        assert batch.receipts == []

    assert [receipt.topic for receipt in batch.receipts] == ["a", "b", "c"]
    assert len(stored(pubsub)) == 3


def test_a_batch_whose_block_raises_sends_nothing(pubsub: NatsPubsub) -> None:
    batch = pubsub.batch()

    def block() -> None:
        with batch:
            batch.publish("a", {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()

    assert stored(pubsub) == []
    assert batch.receipts == []


def test_a_bad_message_of_a_batch_raises_where_it_is_made(pubsub: NatsPubsub) -> None:
    with pubsub.batch() as batch:
        batch.publish("a", {})
        with pytest.raises(EncodingError):
            batch.publish("b", {"x": b""})

    assert [receipt.topic for receipt in batch.receipts] == ["a"]


def test_an_empty_batch_sends_nothing(pubsub: NatsPubsub) -> None:
    with pubsub.batch() as batch:
        pass

    assert batch.receipts == []


def test_if_some_are_not_stored_the_error_has_the_result_of_each(
    pubsub: NatsPubsub, broker: MemoryBroker
) -> None:
    broker.fail_publishes(1)

    with pytest.raises(PartlyPublished, match="1 of 3 messages were not stored") as caught:
        pubsub.publish_many([("a", {}), ("b", {}), ("c", {})])

    failed, *fine = caught.value.results
    assert isinstance(failed, PublishError)
    assert [receipt.topic for receipt in fine if isinstance(receipt, PublishReceipt)] == ["b", "c"]
    assert caught.value.outcome == "unknown"
    assert len(stored(pubsub)) == 2


def test_if_none_is_stored_for_one_reason_that_is_the_error(
    pubsub: NatsPubsub, broker: MemoryBroker
) -> None:
    broker.disconnect()

    with pytest.raises(NotConnected):
        pubsub.publish_many([("a", {}), ("b", {})])


# --- without waiting


def test_publish_nowait_gives_a_future_of_the_receipt(pubsub: NatsPubsub) -> None:
    future = pubsub.publish_nowait("a", {}, event_id="e1")

    assert future.result(1).event_id == "e1"
    assert not future.cancel()


def test_a_future_has_the_error_and_what_cannot_be_sent_raises_at_once(
    pubsub: NatsPubsub, broker: MemoryBroker
) -> None:
    broker.fail_publishes(1)

    assert isinstance(pubsub.publish_nowait("a", {}).exception(1), PublishError)
    with pytest.raises(EncodingError):
        pubsub.publish_nowait("a", [])


def test_publish_async(pubsub: NatsPubsub, broker: MemoryBroker) -> None:
    async def main() -> PublishReceipt:
        return await pubsub.publish_async("a", {}, event_id="e1")

    assert asyncio.run(main()).sequence == 1
    broker.disconnect()
    with pytest.raises(NotConnected):
        asyncio.run(main())


# --- middleware


@pytest.fixture
def trail(pubsub: NatsPubsub) -> list[str]:
    seen: list[str] = []

    @pubsub.publish_middleware
    def outer(draft: Draft, call_next: Any) -> Any:
        seen.append(f"outer {draft.topic}")
        draft.headers = {**draft.headers, "tenant": "a"}
        try:
            return call_next()
        finally:
            seen.append("outer end")

    @pubsub.publish_middleware
    def inner(draft: Draft, call_next: Any) -> Any:
        seen.append(f"inner {draft.headers['tenant']}")
        return call_next(msgspec.structs.replace(draft, message={**draft.message, "seen": True}))

    return seen


def test_middleware_wraps_every_publish_and_may_change_the_draft(
    pubsub: NatsPubsub, trail: list[str]
) -> None:
    pubsub.publish("a", {"n": 1})

    assert trail == ["outer a", "inner a", "outer end"]
    assert envelope(stored(pubsub)[0])["message"] == {"n": 1, "seen": True}
    assert stored(pubsub)[0].headers["tenant"] == "a"


def test_middleware_wraps_what_is_sent_together_too(pubsub: NatsPubsub, trail: list[str]) -> None:
    pubsub.publish(["a", "b"], {})
    pubsub.publish_many([("c", {})])
    pubsub.publish_nowait("d", {}).result(1)
    with pubsub.batch() as batch:
        batch.publish("e", {})

    assert [line for line in trail if line.startswith("outer ") and line != "outer end"] == [
        f"outer {topic}" for topic in "abcde"
    ]
    assert all(envelope(message)["message"] == {"seen": True} for message in stored(pubsub))


def test_middleware_may_refuse_a_message(pubsub: NatsPubsub) -> None:
    @pubsub.publish_middleware
    def refuse(draft: Draft, call_next: Any) -> Any:
        raise PermissionError(draft.topic)

    for call in (
        lambda: pubsub.publish("a", {}),
        lambda: pubsub.publish_many([("a", {})]),
        lambda: pubsub.publish_nowait("a", {}),
    ):
        with pytest.raises(PermissionError):
            call()
    assert stored(pubsub) == []


def test_middleware_hears_in_every_way_of_publishing_when_a_message_is_stored(
    pubsub: NatsPubsub,
) -> None:
    done: list[tuple[str, str, int | None]] = []

    @pubsub.publish_middleware
    def trace(draft: Draft, call_next: Any) -> Any:
        publication = call_next()
        publication.on_done(lambda one: done.append((one.topic, one.status, one.sequence)))
        return publication

    receipt = pubsub.publish("a", {})
    pubsub.publish_many([("b", {}), ("c", {})])
    with pubsub.batch() as batch:
        batch.publish("d", {})
    pubsub.publish_nowait("e", {}).result(5)
    asyncio.run(pubsub.publish_async("f", {}))

    assert done[0] == ("a", "stored", receipt.sequence)
    assert [(topic, status) for topic, status, _ in done] == [(t, "stored") for t in "abcdef"]


def test_middleware_hears_of_a_failure(pubsub: NatsPubsub) -> None:
    heard: list[Any] = []

    @pubsub.publish_middleware
    def trace(draft: Draft, call_next: Any) -> Any:
        publication = call_next()
        publication.on_done(heard.append)
        return publication

    with pytest.raises(PublishError):
        pubsub.publish_many([("a", {"text": "x" * 2_000_000})])

    assert [one.status for one in heard] == ["failed"]
    assert isinstance(heard[0].result, PayloadTooLarge)


def _raise_in_a_batch(pubsub: NatsPubsub) -> None:
    with pubsub.batch() as batch:
        batch.publish("a", {})
        raise ZeroDivisionError


def _open_the_circuit_and_publish(pubsub: NatsPubsub) -> None:
    breaker = pubsub.state().publisher.breaker
    for _ in range(pubsub.state().settings.breaker_threshold):
        breaker.failure()
    pubsub.publish_nowait("a", {})


@pytest.mark.parametrize(
    ("publish", "error"),
    [
        (lambda pubsub: pubsub.publish_many([("a", {}), ("b", {"x": object()})]), EncodingError),
        (_raise_in_a_batch, ZeroDivisionError),
        (_open_the_circuit_and_publish, CircuitOpen),
        (lambda pubsub: pubsub.publish_many([("a", {}, {"outbox": True})]), ConfigurationError),
    ],
    ids=["its neighbour", "the block of a batch", "the open circuit", "no database"],
)
def test_middleware_hears_what_keeps_a_message_from_being_sent(
    pubsub: NatsPubsub, publish: Any, error: type[Exception]
) -> None:
    heard: list[Any] = []

    @pubsub.publish_middleware
    def listen(draft: Draft, call_next: Any) -> Any:
        publication = call_next()
        publication.on_done(heard.append)
        return publication

    with pytest.raises(error):
        publish(pubsub)

    assert [(one.topic, one.status, type(one.result)) for one in heard] == [("a", "failed", error)]


def test_a_draft_may_carry_a_trace_context(pubsub: NatsPubsub) -> None:
    context = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    assert pubsub.publish("a", {}, traceparent=context).status == "stored"
    with pytest.raises(EncodingError, match="not a W3C trace context"):
        pubsub.publish("a", {}, traceparent="nonsense")


def test_middleware_that_forgets_the_result_is_told_so(pubsub: NatsPubsub) -> None:
    @pubsub.publish_middleware
    def forgetful(draft: Draft, call_next: Any) -> None:
        call_next()

    for call in (lambda: pubsub.publish("a", {}), lambda: pubsub.publish_many([("a", {})])):
        with pytest.raises(PublishError, match=r"returned NoneType instead .* call_next"):
            call()


# --- the circuit breaker


def test_after_failures_in_a_row_nothing_is_tried_for_a_while(make_pubsub: MakePubsub) -> None:
    pubsub = make_pubsub(urls="memory://", env="test", breaker_threshold=2, breaker_reset=60)
    broker = pubsub.state().broker()
    assert isinstance(broker, MemoryBroker)
    broker.fail_publishes(2)
    for _ in range(2):
        with pytest.raises(PublishError):
            pubsub.publish("a", {})

    for call in (
        lambda: pubsub.publish("a", {}),
        lambda: pubsub.publish_many([("a", {})]),
        lambda: pubsub.publish_nowait("a", {}),
    ):
        with pytest.raises(CircuitOpen) as caught:
            call()
        assert caught.value.outcome == "not_sent"
    assert stored(pubsub) == []


def test_what_the_caller_did_wrong_does_not_open_the_circuit(make_pubsub: MakePubsub) -> None:
    pubsub = make_pubsub(urls="memory://", env="test", breaker_threshold=1, auto_setup=False)

    for _ in range(3):
        with pytest.raises(NoStreamForSubject):
            pubsub.publish("a", {})
        with pytest.raises(EncodingError):
            pubsub.publish("a", [])


def test_a_success_starts_the_count_anew(make_pubsub: MakePubsub) -> None:
    pubsub = make_pubsub(urls="memory://", env="test", breaker_threshold=2)
    broker = pubsub.state().broker()
    assert isinstance(broker, MemoryBroker)
    for _ in range(3):
        broker.fail_publishes(1)
        with pytest.raises(PublishError):
            pubsub.publish("a", {})
        pubsub.publish("a", {})


# --- signals


def test_a_signal_tells_every_receipt(pubsub: NatsPubsub) -> None:
    told: list[tuple[Flask, PublishReceipt]] = []

    def receiver(sender: Flask, receipt: PublishReceipt) -> None:
        told.append((sender, receipt))

    with message_published.connected_to(receiver):
        receipts = [pubsub.publish("a", {}), *pubsub.publish_many([("b", {}), ("c", {})])]

    assert [receipt for _, receipt in told] == receipts
    assert {sender for sender, _ in told} == {pubsub.state().app}


def test_a_receiver_that_fails_is_logged_and_goes_no_further(
    pubsub: NatsPubsub, caplog: pytest.LogCaptureFixture
) -> None:
    def receiver(sender: Flask, receipt: PublishReceipt) -> None:
        raise ZeroDivisionError

    with message_published.connected_to(receiver):
        assert pubsub.publish("a", {}).sequence == 1
        assert pubsub.publish_nowait("b", {}).result(1).sequence == 2

    assert caplog.text.count("a receiver of the signal 'message-published' failed") == 2


# --- a broker that is stuck


class StuckBroker(MemoryBroker):
    """Takes messages and never answers."""

    def submit(self, messages: Any, timeout: float) -> Ticket:
        assert all(isinstance(message, Message) for message in messages)
        return Ticket(len(messages))


def test_a_wait_ends_even_if_the_broker_never_answers(pubsub: NatsPubsub) -> None:
    pubsub.state().use_broker(StuckBroker())

    with pytest.raises(PublishError, match=r"did not answer within 1\.01 s") as caught:
        pubsub.publish("a", {}, timeout=0.01)

    assert caught.value.outcome == "unknown"
