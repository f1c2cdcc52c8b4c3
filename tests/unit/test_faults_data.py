"""Faults of the table in docs/reliability.md that concern what is in a message."""

from __future__ import annotations

import ast
import dataclasses
import datetime as dt
import decimal
import enum
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flask_natspubsub
from flask_natspubsub.errors import DecodingError, EncodingError
from flask_natspubsub.messages import codec
from flask_natspubsub.messages.message import StoredMessage
from flask_natspubsub.messages.received import read

from .test_codec import encode_object

many_examples = settings(max_examples=10_000 if os.environ.get("TORTURE") == "1" else 200)


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2**60


@dataclasses.dataclass
class Line:
    price: decimal.Decimal
    color: Color | None
    due: dt.date


@dataclasses.dataclass
class Order:
    key: uuid.UUID
    at: dt.datetime
    level: Level
    number: int
    ratio: float
    note: str
    lines: list[Line]
    tags: set[str]
    numbers: frozenset[int]
    waits: dt.timedelta
    opens: dt.time
    by_name: dict[str, decimal.Decimal]


# What cannot be sent: half a surrogate pair, NaN and the like, and times outside the calendar.
texts = st.text(st.characters(exclude_categories=["Cs"]))
decimals = st.decimals(allow_nan=False, allow_infinity=False)
zones = st.timezones() | st.builds(
    dt.timezone, st.timedeltas(dt.timedelta(hours=-23), dt.timedelta(hours=23))
)
moments = st.datetimes(dt.datetime(2, 1, 1), dt.datetime(9998, 1, 1), timezones=zones)
lines = st.builds(Line, decimals, st.sampled_from(Color) | st.none(), st.dates())
orders = st.builds(
    Order,
    key=st.uuids(),
    at=moments,
    level=st.sampled_from(Level),
    number=st.integers(-(10**30), 10**30),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    note=texts,
    lines=st.lists(lines, max_size=3),
    tags=st.sets(texts, max_size=3),
    numbers=st.frozensets(st.integers(), max_size=3),
    waits=st.timedeltas(dt.timedelta(days=-10_000), dt.timedelta(days=10_000)),
    opens=st.times(),
    by_name=st.dictionaries(texts, decimals, max_size=3),
)


@many_examples
@given(orders)
def test_what_a_handler_gets_is_what_was_published(order: Order) -> None:
    """Times are told in UTC: the same moment, by another clock."""
    # Of times that a clock shows twice, Python says that they equal no other zone's.
    order.at, at = order.at.astimezone(dt.UTC), order.at
    assert encode_object(dataclasses.replace(order, at=at)) == encode_object(order)
    received = codec.build_decoder(Order)(codec.decode_object(encode_object(order)))
    assert received == order
    assert [str(one.price) for one in received.lines] == [str(one.price) for one in order.lines]


@many_examples
@given(st.integers() | st.integers(2**53, 2**80) | st.integers(-(2**80), -(2**53)))
def test_integers_of_any_size_are_exact(number: int) -> None:
    assert codec.decode_object(encode_object({"n": number})) == {"n": number}


bad_values = st.sampled_from(
    [
        float("nan"),
        float("inf"),
        -float("inf"),
        decimal.Decimal("sNaN"),
        decimal.Decimal("-Infinity"),
        b"bytes",
        "half \ud83d",
        dt.datetime(2025, 1, 2),
        object(),
        {1: "a"},
        {"a", 1},
        1j,
        Line,
    ]
)
steps = st.lists(st.integers(0, 5) | st.from_regex(r"[a-z_]{1,9}", fullmatch=True), max_size=8)


@many_examples
@given(bad_values, steps)
def test_what_cannot_be_sent_is_an_error_with_its_path(value: Any, path: list[int | str]) -> None:
    for one in reversed(path):
        value = {one: value} if isinstance(one, str) else [*range(one), value]
    with pytest.raises(EncodingError) as caught:
        encode_object({"first": value})
    told = "".join(f".{one}" if isinstance(one, str) else f"[{one}]" for one in path)
    assert caught.value.path == f"$.first{told}"


# --- deep and large

DEEP = 100_000


def least_time(do: Callable[[], object]) -> float:
    """Return the least processor time of three, as the garbage collector may come in between."""
    times = []
    for _ in range(3):
        began = time.thread_time()
        do()
        times.append(time.thread_time() - began)
    return min(times)


def deep_lists() -> Any:
    value: Any = 1
    for _ in range(DEEP):
        value = [value]
    return {"a": value}


def deep_dicts() -> Any:
    value: Any = {}
    for _ in range(DEEP):
        value = {"a": value}
    return value


@pytest.mark.parametrize("make", [deep_lists, deep_dicts])
def test_a_message_of_100_000_levels_is_refused_quickly(make: Any) -> None:
    message = make()

    def refused() -> None:
        with pytest.raises(EncodingError, match="nested deeper"):
            encode_object(message)

    assert least_time(refused) < 0.05


@pytest.mark.parametrize(
    "message",
    [
        b"[" * DEEP + b"]" * DEEP,
        b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        b"[" * DEEP,
        b'{"a":' * DEEP,
        b'[{"a":' * DEEP,
    ],
    ids=lambda message: message[:8].decode(),
)
def test_an_envelope_of_100_000_levels_is_refused_quickly(message: bytes) -> None:
    data = b'{"event_id":"e1","topic":"a","message":' + message + b"}"

    def refused() -> None:
        with pytest.raises(DecodingError) as caught:
            read(StoredMessage("test.shop.a", data, {}, "stream", 1, 0.0))
        assert caught.value.reason == "malformed"

    assert least_time(refused) < 0.05


def test_a_message_of_nothing_but_keys_is_read_quickly() -> None:
    """As many as a server lets through by default, which is 1 MiB."""
    keys = b",".join(b'"%x":0' % number for number in range(130_000))
    data = b'{"event_id":"e1","topic":"a","message":{' + keys + b"}}"
    assert len(data) > 1024 * 1024
    assert len(read(StoredMessage("test.shop.a", data, {}, "stream", 1, 0.0)).message) == 130_000
    assert least_time(lambda: read(StoredMessage("test.shop.a", data, {}, "stream", 1, 0.0))) < 0.5


# --- what runs code

FORBIDDEN = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}


def test_nothing_that_arrives_can_run_code() -> None:
    """No pickle and its like anywhere in the package, and no call of eval."""
    found = []
    for path in sorted(Path(flask_natspubsub.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]} if not node.level else set()
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = {node.func.id} & RUNS_CODE
            else:
                continue
            found += [f"{path.name}: {name}" for name in names & (FORBIDDEN | RUNS_CODE)]
    assert found == []
