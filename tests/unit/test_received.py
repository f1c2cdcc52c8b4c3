from __future__ import annotations

import contextlib
import datetime as dt
import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_natspubsub.errors import DecodingError
from flask_natspubsub.messages import envelope, received
from flask_natspubsub.messages.envelope import Envelope
from flask_natspubsub.messages.message import StoredMessage
from flask_natspubsub.messages.plain import plain_object

from .test_envelope import EVENT_ID, an_envelope

SUBJECT = "production.shop.order.created"


def read(body: object, headers: dict[str, str] | None = None) -> received.Received:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return received.read(
        StoredMessage(SUBJECT, data, headers or {}, "production-events-stream", 7, 0.0)
    )


def test_what_was_sent_is_read_back() -> None:
    sent = an_envelope(
        message_type="OrderCreated", trace_id="t", correlation_id="c", causation_id="d"
    )
    got = read(sent.encode(), envelope.headers_for(sent))
    assert got.event_id == EVENT_ID
    assert got.topic == "order.created"
    assert got.message == {"order_id": 42}
    assert got.message_type == "OrderCreated"
    assert got.producer == "shop"
    assert got.trace_id == "t"
    assert got.correlation_id == "c"
    assert got.causation_id == "d"
    assert got.occurred_at == dt.datetime(2025, 1, 2, 3, 4, 5, 678_000, tzinfo=dt.UTC)


def test_the_body_is_the_message_else_the_payload() -> None:
    assert read({"message": {"a": 1}, "payload": {"b": 2}}).message == {"a": 1}
    assert read({"payload": {"b": 2}}).message == {"b": 2}
    assert read({"message": None, "payload": {"b": 2}}).message == {"b": 2}
    assert read({"message": {}, "payload": {"b": 2}}).message == {}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"order_id": 42},
        {"message": "text"},
        {"message": [1]},
        {"message": [1], "payload": {}},
        {"payload": None},
        {"payload": 5},
        [],
        None,
        b"",
        b"not json",
        b'{"message":{"a":"\xff"}}',
        b'{"message":' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}",
    ],
    ids=lambda body: repr(body)[:30],
)
def test_without_an_object_in_it_a_message_is_malformed(body: object) -> None:
    with pytest.raises(DecodingError) as caught:
        read(body)
    assert caught.value.reason == "malformed"


def test_the_error_says_what_a_message_looks_like() -> None:
    with pytest.raises(DecodingError, match=r"'message' or 'payload'.*event_id"):
        read({"order_id": 42})


def test_unknown_keys_are_kept() -> None:
    body = {"message": {}, "tenant": "a", "schema_version": 9}
    assert read(body).envelope == body


@pytest.mark.parametrize(
    ("body", "headers", "event_id"),
    [
        ({"event_id": "a"}, {"Nats-Msg-Id": "b", "nats-msg-id": "c"}, "a"),
        ({}, {"Nats-Msg-Id": "b", "nats-msg-id": "c"}, "b"),
        ({}, {"nats-msg-id": "c"}, "c"),
        ({}, {}, "production-events-stream:7"),
        ({"event_id": 42}, {"Nats-Msg-Id": "b"}, "42"),
        ({"event_id": " a "}, {}, " a "),
        ({"event_id": ""}, {"Nats-Msg-Id": "b"}, "b"),
        ({"event_id": "  "}, {"Nats-Msg-Id": "b"}, "b"),
        ({"event_id": None}, {"Nats-Msg-Id": "b"}, "b"),
        ({"event_id": True}, {"Nats-Msg-Id": "b"}, "b"),
        ({"event_id": ["a"]}, {"Nats-Msg-Id": "b"}, "b"),
        ({"event_id": "a\nb"}, {"Nats-Msg-Id": "b"}, "b"),
        ({"event_id": "a" * 256}, {"Nats-Msg-Id": "\x00", "nats-msg-id": "c"}, "c"),
    ],
)
def test_the_event_id_has_fallbacks(
    body: dict[str, Any], headers: dict[str, str], event_id: str
) -> None:
    assert read({"message": {}} | body, headers).event_id == event_id


@pytest.mark.parametrize(
    ("body", "topic"),
    [
        ({"topic": "Order.Created"}, "Order.Created"),
        ({"topic": "a", "domain": "d", "resource": "r", "action": "x"}, "a"),
        ({"domain": "d", "resource": "r", "action": "x"}, "d.r.x"),
        ({"topic": 5, "domain": "d", "resource": "r", "action": "x"}, "d.r.x"),
        ({"domain": "d", "resource": "r"}, "order.created"),
        ({"domain": "d", "resource": "", "action": "x"}, "order.created"),
        ({}, "order.created"),
        ({"topic": "a\nb"}, "order.created"),
    ],
)
def test_the_topic_has_fallbacks(body: dict[str, Any], topic: str) -> None:
    assert read({"message": {}} | body).topic == topic


@pytest.mark.parametrize("value", [5, True, None, [], {}, "", "  ", "a\r\nb", "a\x00", "a" * 256])
def test_optional_keys_of_no_use_are_absent_and_no_error(value: object) -> None:
    keys = (
        *("message_type", "producer", "trace_id", "correlation_id", "causation_id"),
        "occurred_at",
    )
    got = read({"message": {}} | dict.fromkeys(keys, value))
    assert [getattr(got, key) for key in keys] == [None] * len(keys)


@pytest.mark.parametrize(
    "text", ["2025-01-02T03:04:05Z", "2025-01-02T03:04:05.000000Z", "2025-01-02T05:04:05+02:00"]
)
def test_occurred_at_is_read_in_every_form_in_use(text: str) -> None:
    moment = read({"message": {}, "occurred_at": text}).occurred_at
    assert moment == dt.datetime(2025, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


@pytest.mark.parametrize("text", ["yesterday", "2025-99-99T00:00:00Z", "2025-01-02T03:04:05"])
def test_an_occurred_at_that_is_no_time_is_absent(text: str) -> None:
    assert read({"message": {}, "occurred_at": text}).occurred_at is None


finite = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers() | st.text() | finite
hostile_values = st.recursive(
    scalars | st.text(st.characters(codec="utf-8", categories=["Cc"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
known_keys = st.sampled_from([*Envelope.__struct_fields__, "payload", "unknown"])


@given(st.binary(), st.dictionaries(st.text(), st.text()))
def test_any_bytes_are_read_or_are_a_decoding_error(data: bytes, headers: dict[str, str]) -> None:
    with contextlib.suppress(DecodingError):
        received.read(StoredMessage(SUBJECT, data, headers, "S", 1, 0.0))


@given(st.dictionaries(known_keys, hostile_values))
def test_any_envelope_is_read_or_is_a_decoding_error(body: dict[str, Any]) -> None:
    try:
        got = read(body)
    except DecodingError:
        assert not isinstance(body.get("message"), dict)
        return
    for text in (got.event_id, got.topic):
        assert 0 < len(text) <= 255
        assert not any(unicodedata.category(character) == "Cc" for character in text)


@given(st.text(min_size=1), st.dictionaries(st.text(), scalars))
def test_any_message_survives_the_envelope(topic: str, message: dict[str, Any]) -> None:
    sent = an_envelope(topic=topic, message=plain_object(message))
    got = read(sent.encode(), envelope.headers_for(sent))
    assert got.message == message
    assert got.envelope["topic"] == topic
