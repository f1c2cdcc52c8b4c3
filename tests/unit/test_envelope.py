from __future__ import annotations

from typing import Any

import pytest
from werkzeug.datastructures import MultiDict

from flask_natspubsub.errors import EncodingError
from flask_natspubsub.messages import envelope
from flask_natspubsub.messages.envelope import Envelope

EVENT_ID = "22222222-2222-4222-8222-222222222222"


def an_envelope(**changes: Any) -> Envelope:
    values: dict[str, Any] = {
        "event_id": EVENT_ID,
        "schema_version": envelope.SCHEMA_VERSION,
        "topic": "order.created",
        "producer": "shop",
        "occurred_at": "2025-01-02T03:04:05.678Z",
        "message": {"order_id": 42},
    }
    return Envelope(**values | changes)


def test_the_example_of_the_wire_format_to_the_byte() -> None:
    sent = an_envelope(message_type="OrderCreated", trace_id="trace-abc").encode()
    assert sent == (
        b'{"event_id":"22222222-2222-4222-8222-222222222222","schema_version":1,'
        b'"topic":"order.created","message_type":"OrderCreated","producer":"shop",'
        b'"occurred_at":"2025-01-02T03:04:05.678Z","trace_id":"trace-abc",'
        b'"message":{"order_id":42}}'
    )


def test_absent_values_are_omitted_and_nulls_in_the_message_kept() -> None:
    assert an_envelope(message={"note": None}).encode() == (
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


def test_header_that_is_given_twice_is_refused() -> None:
    envelope.check_headers(MultiDict([("X-Tenant", "a"), ("X-Other", "b")]))
    with pytest.raises(EncodingError, match="'X-Tenant' is given 2 times"):
        envelope.check_headers(MultiDict([("X-Tenant", "a"), ("X-Tenant", "b")]))


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
