from __future__ import annotations

import contextlib
import datetime as dt
import json
import unicodedata
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_natspubsub.errors import DecodingError, EncodingError
from flask_natspubsub.messages import codec, envelope
from flask_natspubsub.messages.envelope import Envelope

EVENT_ID = "22222222-2222-4222-8222-222222222222"
SUBJECT = "production.shop.order.created"


def an_envelope(**changes: Any) -> Envelope:
    values: dict[str, Any] = {
        "event_id": EVENT_ID,
        "schema_version": envelope.SCHEMA_VERSION,
        "topic": "order.created",
        "producer": "shop",
        "occurred_at": "2025-01-02T03:04:05.678Z",
        "message": b'{"order_id":42}',
    }
    values |= changes
    return Envelope(**values | {"message": msgspec.Raw(values["message"])})


def read(body: object, headers: dict[str, str] | None = None) -> envelope.Received:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return envelope.read(data, headers or {}, SUBJECT, "production-events-stream", 7)


# --- sending -------------------------------------------------------------------------------


def test_the_example_of_the_wire_format_to_the_byte() -> None:
    sent = an_envelope(message_type="OrderCreated", trace_id="trace-abc").encode()
    assert sent == (
        b'{"event_id":"22222222-2222-4222-8222-222222222222","schema_version":1,'
        b'"topic":"order.created","message_type":"OrderCreated","producer":"shop",'
        b'"occurred_at":"2025-01-02T03:04:05.678Z","trace_id":"trace-abc",'
        b'"message":{"order_id":42}}'
    )


def test_absent_values_are_omitted_and_nulls_in_the_message_kept() -> None:
    assert an_envelope(message=b'{"note":null}').encode() == (
        b'{"event_id":"22222222-2222-4222-8222-222222222222","schema_version":1,'
        b'"topic":"order.created","producer":"shop",'
        b'"occurred_at":"2025-01-02T03:04:05.678Z","message":{"note":null}}'
    )


def test_an_event_and_our_own_ids_come_after_the_message() -> None:
    sent = an_envelope(
        domain="sales",
        resource="order",
        action="created",
        resource_id=42,
        correlation_id="c-1",
        causation_id="c-2",
    ).encode()
    assert sent.endswith(
        b'"message":{"order_id":42},"domain":"sales","resource":"order","action":"created",'
        b'"resource_id":42,"correlation_id":"c-1","causation_id":"c-2"}'
    )


def test_the_topic_stays_as_the_caller_wrote_it() -> None:
    sent = an_envelope(topic="Bestellung/größer").encode()
    assert '"topic":"Bestellung/größer"'.encode() in sent


def test_an_envelope_with_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(EncodingError):
        an_envelope(message_type="\ud800").encode()


@pytest.mark.parametrize(
    ("message", "resource_id"),
    [
        ({"id": 42}, 42),
        ({"id": "42"}, "42"),
        ({"id": {"a": 1}}, {"a": 1}),
        ({}, None),
        ({"id": None}, None),
        ({"id": 0}, None),
        ({"id": ""}, None),
        ({"id": False}, None),
    ],
)
def test_the_resource_id_is_the_messages_id(message: dict[str, Any], resource_id: object) -> None:
    assert envelope.resource_id_of(message) == resource_id


def test_headers_are_in_the_order_of_the_wire_format() -> None:
    headers = envelope.headers_for(
        an_envelope(trace_id="trace-abc"), {"tenant": "a", "Priority": "9"}, "00-ab-cd-01"
    )
    assert list(headers.items()) == [
        ("topic", "order.created"),
        ("trace_id", "trace-abc"),
        ("Nats-Msg-Id", EVENT_ID),
        ("traceparent", "00-ab-cd-01"),
        ("tenant", "a"),
        ("Priority", "9"),
    ]


def test_headers_without_a_trace() -> None:
    headers = envelope.headers_for(an_envelope())
    assert list(headers.items()) == [("topic", "order.created"), ("Nats-Msg-Id", EVENT_ID)]


def test_a_topic_cannot_add_headers() -> None:
    headers = envelope.headers_for(an_envelope(topic="a\r\nNats-Rollup: all"))
    assert headers["topic"] == "a__Nats-Rollup: all"


@pytest.mark.parametrize("name", ["a", "X-Tenant", "a.b_c", "natsy", "trace-id"])
@pytest.mark.parametrize("value", ["", "text", "größe 1", "a: b"])
def test_a_caller_may_send_headers(name: str, value: str) -> None:
    envelope.check_headers({name: value})


@pytest.mark.parametrize(
    "name",
    [
        *("Nats-Msg-Id", "nats-msg-id", "NATS-Expected-Stream", "nats-"),
        *("topic", "trace_id", "traceparent", "Topic", "TRACEPARENT"),
        *("", "a b", "a:b", "a\r\nb", "a\x00", "größe", 7, None, b"a"),
    ],
)
def test_header_names_that_are_not_the_callers_are_refused(name: Any) -> None:
    with pytest.raises(EncodingError) as caught:
        envelope.check_headers({"fine": "x", name: "text"})
    assert caught.value.path.startswith("headers.")
    assert "\n" not in str(caught.value)
    with pytest.raises(EncodingError):
        envelope.headers_for(an_envelope(), {name: "text"})


@pytest.mark.parametrize(
    "value",
    ["a\nb", "a\r\nNats-Msg-Id: x", "\x00", "a\tb", "\x7f", "\x85", "\ud800", 7, None, b"a"],
)
def test_header_values_are_one_line_of_text(value: Any) -> None:
    with pytest.raises(EncodingError) as caught:
        envelope.check_headers({"X-Tenant": value})
    assert caught.value.path == "headers.X-Tenant"


def test_headers_are_a_mapping() -> None:
    with pytest.raises(EncodingError) as caught:
        envelope.check_headers([("a", "b")])  # type: ignore[arg-type]
    assert caught.value.path == "headers"


@pytest.mark.parametrize("value", ["a", EVENT_ID, "order-1/created:2", "~" * 255])
def test_identifiers_are_printable_ascii(value: str) -> None:
    assert envelope.check_identifier(value, "event_id") == value


@pytest.mark.parametrize("value", ["", " ", "a b", "a\n", "a\r\nb", "é", "a" * 256, 7, None, b"a"])
def test_other_identifiers_are_refused(value: Any) -> None:
    with pytest.raises(EncodingError) as caught:
        envelope.check_identifier(value, "event_id")
    assert caught.value.path == "event_id"


# --- reading -------------------------------------------------------------------------------


def test_what_was_sent_is_read_back() -> None:
    sent = an_envelope(
        message_type="OrderCreated", trace_id="t", correlation_id="c", causation_id="d"
    )
    received = read(sent.encode(), envelope.headers_for(sent))
    assert received.event_id == EVENT_ID
    assert received.topic == "order.created"
    assert received.message == {"order_id": 42}
    assert received.message_type == "OrderCreated"
    assert received.producer == "shop"
    assert received.trace_id == "t"
    assert received.correlation_id == "c"
    assert received.causation_id == "d"
    assert received.occurred_at == dt.datetime(2025, 1, 2, 3, 4, 5, 678_000, tzinfo=dt.UTC)


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
    received = read({"message": {}} | dict.fromkeys(keys, value))
    assert [getattr(received, key) for key in keys] == [None] * len(keys)


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
        envelope.read(data, headers, SUBJECT, "S", 1)


@given(st.dictionaries(known_keys, hostile_values))
def test_any_envelope_is_read_or_is_a_decoding_error(body: dict[str, Any]) -> None:
    try:
        received = read(body)
    except DecodingError:
        assert not isinstance(body.get("message"), dict)
        return
    for text in (received.event_id, received.topic):
        assert 0 < len(text) <= 255
        assert not any(unicodedata.category(character) == "Cc" for character in text)


@given(st.text(min_size=1), st.dictionaries(st.text(), scalars))
def test_any_message_survives_the_envelope(topic: str, message: dict[str, Any]) -> None:
    sent = an_envelope(topic=topic, message=codec.encode_object(message))
    received = read(sent.encode(), envelope.headers_for(sent))
    assert received.message == message
    assert received.envelope["topic"] == topic
