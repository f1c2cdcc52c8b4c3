"""Faults of the table in docs/reliability.md that concern the outbox: clocks and hostile text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from flask_natspubsub import EncodingError, InvalidTopic, PublishDenied
from flask_natspubsub.messages import ids
from tests.support.waiting import eventually

from .conftest import MakeShop
from .shop import OutboxShop, message_of


@contextmanager
def clock_off_by(seconds: float) -> Iterator[None]:
    """Be on a host whose clock is wrong. What Python's monotonic clock says is not changed."""
    wrong = pytest.MonkeyPatch()
    right, right_ns = time.time, time.time_ns
    wrong.setattr(time, "time", lambda: right() + seconds)
    wrong.setattr(time, "time_ns", lambda: right_ns() + int(seconds * 1e9))
    wrong.setattr(ids, "_latest", ids._latest)  # no later id is to be greater than these
    try:
        yield
    finally:
        wrong.undo()


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_a_host_whose_clock_is_an_hour_off_sends_nothing_early_or_twice(
    shop: OutboxShop, seconds: float
) -> None:
    first, second, third = shop.relay(), shop.relay(), shop.relay()
    shop.commit(1)
    shop.commit(2, delay=1800)
    assert first.step() == 1
    with clock_off_by(seconds):
        assert second.step() == 0
        assert (first.partitions, second.partitions) == ([0], []), "a lease was taken away"
        shop.commit(3)
        shop.commit(4, delay=1800)
        assert first.step() == 1
    first.release()
    with clock_off_by(seconds):
        shop.commit(5)
        assert third.step() == 1
        assert third.is_idle()
    assert second.step() == first.step() == 0
    assert third.partitions == [0]
    shop.advance(1795)
    assert third.step() == 0, "sent too early"
    shop.advance(10)
    assert third.step() == 2
    third.release()
    assert shop.sent == [1, 3, 5, 2, 4]
    assert [relay.lease_lost for relay in (first, second, third)] == [0, 0, 0]


HOSTILE = {
    "n": 1,
    "nul": "a\0b",
    "nul\0key": ["\0", {"\0": "\0"}],
    "controls": "".join(map(chr, range(32))) + "\x7f\x85\u2028\ufeff",
    "beyond": "\U0001f600\U0010ffff\ufffe\uffff",
    "quotes": "'; DROP TABLE natspubsub_outbox; -- \\ \" %s :x $1 ?",
    "integers": [2**53 + 1, -(2**63) - 1, 2**64 + 1, 10**300],
}


def test_text_that_databases_refuse_goes_through_unchanged(shop: OutboxShop) -> None:
    """The payload is kept as bytes, and a NUL in JSON is escaped."""
    with shop.app.app_context():
        shop.pubsub.publish("order.created", HOSTILE)
        shop.session.commit()
    assert shop.relay().run_once() == 1
    (stored,) = shop.stored
    assert message_of(stored.data) == HOSTILE


@pytest.mark.parametrize(
    ("topic", "message", "options"),
    [
        ("a.b", {"text": "half \ud83d"}, {}),
        ("a.b", {"\udfff": 1}, {}),
        ("a.b", {}, {"event_id": "nul\0"}),
        ("a.b", {}, {"event_id": "\ud800"}),
        ("a.b", {}, {"ordering_key": "nul\0"}),
        ("a.b", {}, {"ordering_key": "\ud800"}),
        ("a.b", {}, {"trace_id": "nul\0"}),
        ("a.b", {}, {"headers": {"X-A": "nul\0"}}),
        ("a.b", {}, {"headers": {"X-A": "\ud800"}}),
        ("a.\ud800", {}, {}),
    ],
)
def test_text_that_cannot_be_sent_is_refused_before_the_commit(
    sqlite_shop: OutboxShop, topic: str, message: Any, options: dict[str, Any]
) -> None:
    shop = sqlite_shop
    with shop.app.app_context():
        shop.session.add(shop.Order(name="a"))
        with pytest.raises((EncodingError, InvalidTopic)):
            shop.pubsub.publish(topic, message, **options)
        shop.session.commit()
    assert (shop.orders, shop.rows) == (["a"], [])


def test_the_error_of_a_row_may_be_any_text(make_shop: MakeShop, url: str) -> None:
    shop = make_shop(url)
    flaky = shop.use_flaky_broker()
    flaky.failures[1] = [PublishDenied("nul \0, half \ud83d, \x1b[2J, " + "é" * 3000)]
    shop.commit(1)
    assert shop.relay().run_once() == 0
    (row,) = shop.rows
    assert row["last_error"].startswith("nul")
    assert row["last_error"].isprintable()
    flaky.failures.clear()
    shop.advance(60)
    assert shop.relay().run_once() == 1


def test_nothing_is_asked_of_the_database_after_a_commit(sqlite_shop: OutboxShop) -> None:
    """SQLAlchemy allows no SQL in its hook there: relays are only woken up."""
    shop, told = sqlite_shop, []
    with shop.app.app_context(), shop.wakeups() as wakeups:
        shop.session.add(shop.Order(name="a"))
        shop.publish(1)
        connection = shop.session.connection()
        sa.event.listen(connection, "commit", lambda *_: told.append("commit"))
        sa.event.listen(shop.engine, "before_cursor_execute", lambda *_: told.append("SQL"))
        shop.session.commit()
        eventually(lambda: len(wakeups) == 1)
    assert told[-1] == "commit"
    assert told.count("commit") == 1
