"""The bytes of the protocol that the hot paths write and read themselves."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_natspubsub.brokers import wire
from flask_natspubsub.brokers.wire import (
    FrameTap,
    LazyHeaders,
    frame,
    header_block,
    parse_ack_subject,
    parse_headers,
)


def test_a_message_with_headers() -> None:
    block = header_block({"topic": "order.created", "Nats-Msg-Id": "e1"})

    assert block == b"NATS/1.0\r\ntopic: order.created\r\nNats-Msg-Id: e1\r\n\r\n"
    assert frame("a.b", b"{}", "_INBOX.1", block) == (
        b"HPUB a.b _INBOX.1 %d %d\r\n" % (len(block), len(block) + 2) + block + b"{}\r\n"
    )


def test_a_message_without_headers() -> None:
    assert header_block({}) == b""
    assert frame("a.b", b"hello", "r") == b"PUB a.b r 5\r\nhello\r\n"
    assert frame("a.b", b"") == b"PUB a.b  0\r\n\r\n"


def test_sizes_are_counted_in_bytes() -> None:
    block = header_block({"topic": "größe"})
    size = len("NATS/1.0\r\ntopic: größe\r\n\r\n".encode())

    assert frame("s", "ü".encode(), "r", block).startswith(b"HPUB s r %d %d\r\n" % (size, size + 2))


def test_headers_keep_their_order_and_text() -> None:
    headers = {"b": "2", "a": "größe: x", "c": "with  spaces inside", "d": ""}

    assert list(parse_headers(header_block(headers)).items()) == list(headers.items())


def test_text_that_is_no_unicode_does_not_stop_the_messages_behind_it() -> None:
    assert header_block({"a": "\ud800"}) == b"NATS/1.0\r\na: ?\r\n\r\n"


NAMES = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=":"), min_size=1
)
VALUES = st.text(st.characters(exclude_categories=["Cc", "Cs", "Z"]))


@given(st.dictionaries(NAMES, VALUES))
def test_headers_survive_the_way(headers: dict[str, str]) -> None:
    assert parse_headers(header_block(headers) or b"NATS/1.0\r\n\r\n") == headers


@pytest.mark.parametrize(
    ("line", "status", "description"),
    [
        (b"NATS/1.0 503", "503", ""),
        (b"NATS/1.0 100 Idle Heartbeat", "100", "Idle Heartbeat"),
        (b"NATS/1.0 409 Consumer Deleted", "409", "Consumer Deleted"),
    ],
)
def test_a_status_line_becomes_two_headers(line: bytes, status: str, description: str) -> None:
    headers = parse_headers(line + b"\r\nNats-Pending-Messages: 7\r\n\r\n")

    assert headers == {
        "Status": status,
        "Description": description,
        "Nats-Pending-Messages": "7",
    }


@given(st.binary())
def test_reading_headers_never_raises(block: bytes) -> None:
    parse_headers(block)


def test_what_is_no_header_line_is_passed_over() -> None:
    assert parse_headers(b"NATS/1.0\r\nno colon\r\n: no name\r\na:1\r\nb: \xff\r\n\r\n") == {
        "a": "1",
        "b": "\ufffd",
    }


@given(st.dictionaries(NAMES, VALUES))
def test_headers_read_late_are_the_same(headers: dict[str, str]) -> None:
    block = header_block(headers) or b"NATS/1.0\r\n\r\n"

    assert LazyHeaders(block) == headers
    assert list(LazyHeaders(block)) == list(headers)
    assert len(LazyHeaders(block)) == len(headers)
    for name, value in headers.items():
        assert LazyHeaders(block).get(name) == LazyHeaders(block)[name] == value
    assert LazyHeaders(block).get("Not-There", "other") == "other"
    assert repr(LazyHeaders(block)) == repr(headers)


def test_headers_are_not_read_for_one_that_is_not_among_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "parse_headers", lambda block: pytest.fail("they were read"))
    headers = LazyHeaders(header_block({"topic": "order.created"}))

    assert headers.get("traceparent") is None
    with pytest.raises(pytest.fail.Exception):
        headers.get("topic")


def test_the_tap_tells_a_status_from_headers() -> None:
    got: list[Mapping[str, str]] = []
    tap = FrameTap({1: lambda subject, reply, headers, data: got.append(headers)}, print)

    for block in (b"NATS/1.0 404 No Messages\r\n\r\n", b"NATS/1.0\r\ntopic: a\r\n\r\n"):
        tap.feed(b"HMSG s 1 %d %d\r\n%b\r\n" % (len(block), len(block), block))

    assert got == [{"Status": "404", "Description": "No Messages"}, {"topic": "a"}]


def test_the_ack_subject_in_its_old_and_its_new_form() -> None:
    told = ("events", 3, 12, 1_700_000_000.5)

    assert parse_ack_subject("$JS.ACK.events.mailer.3.12.9.1700000000500000000.4") == told
    assert parse_ack_subject("$JS.ACK._.acc.events.mailer.3.12.9.1700000000500000000.4.tok") == told


@pytest.mark.parametrize(
    "reply",
    ["", "_INBOX.1", "$JS.ACK.a", "$JS.FC.events.mailer.3.12.9.17.4", "$JS.ACK.a.b.x.y.z.1.2"],
)
def test_another_reply_subject_is_refused(reply: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of no text of its own
        parse_ack_subject(reply)


@pytest.mark.parametrize("broken", ["a\r\nNats-Rollup: all", "a\nNats-TTL: 1s", "a\rb", "\r\n\r\n"])
def test_no_header_becomes_two_whoever_made_it(broken: str) -> None:
    for headers in ({"x": broken, "y": "2"}, {broken: "1", "y": "2"}):
        block = header_block(headers)
        assert block.count(b"\r\n") == 4
        assert block.count(b"\n") == block.count(b"\r") == 4
        assert parse_headers(block)["y"] == "2"
        assert "Nats-Rollup" not in parse_headers(block)
