"""Headers that were sent more than once."""

from __future__ import annotations

import copy
import pickle

from flask_natspubsub.brokers.wire import LazyHeaders, header_block, parse_headers
from flask_natspubsub.messages.headers import Headers, for_json, pairs_of

TWICE = [("Accept", "a"), ("Other", "x"), ("Accept", "b")]


def test_a_header_sent_twice_keeps_both_values() -> None:
    headers = Headers(TWICE)
    assert headers == {"Accept": "a", "Other": "x"}
    assert headers.getlist("Accept") == ["a", "b"]
    assert headers.getlist("Other") == ["x"]
    assert headers.getlist("accept") == []
    assert list(headers.pairs()) == [("Accept", "a"), ("Accept", "b"), ("Other", "x")]
    assert for_json(headers) == {"Accept": ["a", "b"], "Other": "x"}


def test_what_is_set_or_deleted_has_no_second_value() -> None:
    headers = Headers(TWICE)
    headers["Accept"] = "c"
    assert headers.getlist("Accept") == ["c"]
    headers = Headers(TWICE)
    del headers["Accept"]
    headers["Accept"] = "d"
    assert headers.getlist("Accept") == ["d"]
    headers = Headers(TWICE)
    assert headers.pop("Accept") == "a"
    assert list(headers.pairs()) == [("Other", "x")]


def test_joined_headers_keep_what_the_other_does_not_have() -> None:
    joined = Headers(TWICE) | {"Other": "y"}
    assert sorted(joined.pairs()) == [("Accept", "a"), ("Accept", "b"), ("Other", "y")]
    joined = Headers([("Other", "z")]) | Headers(TWICE)
    assert sorted(joined.pairs()) == sorted(TWICE)


def test_copies_keep_all_values() -> None:
    headers = Headers(TWICE)
    for other in (Headers(headers), copy.copy(headers), pickle.loads(pickle.dumps(headers))):
        assert list(other.pairs()) == list(headers.pairs())


def test_they_go_over_the_wire_and_back() -> None:
    block = header_block(Headers(TWICE))
    assert block == b"NATS/1.0\r\nAccept: a\r\nAccept: b\r\nOther: x\r\n\r\n"
    assert parse_headers(block).getlist("Accept") == ["a", "b"]
    assert list(pairs_of(LazyHeaders(block))) == list(Headers(TWICE).pairs())
    assert list(pairs_of({"a": "b"})) == [("a", "b")]
