"""What publishing writes, and that it lives and dies with the caller's transaction."""

from __future__ import annotations

import asyncio
import datetime as dt
import gc
import json
import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy_lite import SQLAlchemy as Lite

from flask_natspubsub import (
    ConfigurationError,
    EncodingError,
    InvalidTopic,
    NatsPubsub,
    PayloadTooLarge,
)
from flask_natspubsub.errors import TablesMissing

from .conftest import MakeShop
from .shop import OutboxShop, message_of


def database_time(shop: OutboxShop) -> float:
    assert shop.state.persistence is not None
    now = shop.state.persistence.database.now()
    return float(shop.execute(sa.select(now))[0][0])


# --- what a row holds


def test_row_holds_what_is_to_be_sent(shop: OutboxShop) -> None:
    before = database_time(shop)
    with shop.app.app_context():
        receipt = shop.pubsub.publish(
            "order.created",
            {"n": 1, "name": "Zoë 🦊"},
            event_id="order-1-created",
            ordering_key="order-1",
            headers={"x-shop": "münchen"},
        )
        shop.session.commit()
    assert receipt.status == "outbox"
    assert receipt.event_id == "order-1-created"
    assert (receipt.stream, receipt.sequence, receipt.duplicate) == (None, None, False)
    (row,) = shop.rows
    assert row["event_id"] == "order-1-created"
    assert row["subject"] == receipt.subject == f"{shop.state.settings.env}.shop.order.created"
    assert row["ordering_key"] == "order-1"
    assert (row["status"], row["attempts"], row["partition"]) == ("pending", 0, 0)
    assert message_of(row["payload"]) == {"n": 1, "name": "Zoë 🦊"}
    headers = json.loads(row["headers"])
    assert headers["Nats-Msg-Id"] == "order-1-created"
    assert headers["x-shop"] == "münchen"
    assert before <= row["created_at"] <= database_time(shop)
    for name in ("available_at", "last_error", "sent_at", "stream", "stream_sequence"):
        assert row[name] is None


def test_row_is_relayed_byte_for_byte(shop: OutboxShop) -> None:
    with shop.app.app_context():
        shop.pubsub.publish("order.created", {"n": 1, "bytes": "\x7f\u2028ß"}, event_id="one")
        shop.session.commit()
    (row,) = shop.rows
    assert shop.relay().run_once() == 1
    (message,) = shop.stored
    assert message.data == bytes(row["payload"])
    assert dict(message.headers) == json.loads(row["headers"])


def test_payload_of_a_megabyte_is_kept(shop: OutboxShop) -> None:
    text = "x" * 1_000_000
    with shop.app.app_context():
        shop.pubsub.publish("order.created", {"n": 1, "text": text})
        shop.session.commit()
    assert message_of(shop.rows[0]["payload"])["text"] == text


def test_rows_are_in_the_order_of_publishes(shop: OutboxShop) -> None:
    with shop.app.app_context():
        shop.publish(1, 2)
        shop.session.add(shop.Order(name="between"))
        shop.publish(3, delay=1)
        shop.session.flush()
        shop.publish(4, event_id="named")
        with shop.session.begin_nested():
            shop.publish(5)
        shop.publish(6, ordering_key="k")
        shop.publish(7)
        shop.session.commit()
        shop.publish(*range(8, 60))
        shop.session.commit()
    assert shop.numbers == list(range(1, 60))


def test_rows_are_spread_over_partitions_by_key(make_shop: MakeShop, sqlite: str) -> None:
    shop = make_shop(sqlite, outbox_partitions=4)
    with shop.app.app_context():
        for key in ("a", "b", "c", "d", "e", "f"):
            shop.publish(1, 2, 3, ordering_key=key)
        shop.publish(*range(40))
        shop.session.commit()
    by_key: dict[str, set[int]] = {}
    for row in shop.rows:
        by_key.setdefault(row["ordering_key"], set()).add(row["partition"])
    without_key = by_key.pop(None)  # type: ignore[call-overload]
    assert without_key == {0, 1, 2, 3}
    assert all(len(partitions) == 1 for partitions in by_key.values())
    assert set.union(*by_key.values()) <= {0, 1, 2, 3}


@pytest.mark.parametrize("delay", [60, dt.timedelta(minutes=1)])
def test_delay_is_counted_by_the_clock_of_the_database(shop: OutboxShop, delay: Any) -> None:
    before = database_time(shop)
    shop.commit(1, delay=delay)
    (row,) = shop.rows
    assert before + 60 <= row["available_at"] <= database_time(shop) + 60


def test_available_at_is_kept(shop: OutboxShop) -> None:
    at = dt.datetime(2030, 1, 2, 3, 4, 5, 678000, dt.timezone(dt.timedelta(hours=2)))
    shop.commit(1, available_at=at)
    assert shop.rows[0]["available_at"] == pytest.approx(at.timestamp(), abs=1e-3)


def test_database_clock_is_the_time_of_day_in_utc(shop: OutboxShop) -> None:
    assert abs(database_time(shop) - dt.datetime.now(dt.UTC).timestamp()) < 5


# --- one transaction


def test_row_is_committed_with_the_domain_row(shop: OutboxShop) -> None:
    with shop.app.app_context():
        shop.session.add(shop.Order(name="a"))
        shop.publish(1)
        shop.session.flush()
        assert (shop.orders, shop.rows) == ([], [])
        shop.session.commit()
    assert (shop.orders, shop.numbers) == (["a"], [1])


def test_rollback_drops_it(shop: OutboxShop) -> None:
    with shop.app.app_context():
        shop.publish(1)
        shop.session.rollback()
        shop.publish(2)
        shop.session.flush()
        shop.session.rollback()
        shop.publish(3)
        shop.session.commit()
    assert shop.numbers == [3]


def test_end_of_the_context_without_commit_drops_it(shop: OutboxShop) -> None:
    with shop.app.app_context():
        shop.publish(1)
        shop.session.flush()
    assert shop.rows == []


def test_failing_commit_drops_it(shop: OutboxShop) -> None:
    with shop.app.app_context():
        shop.session.add(shop.Order(name="a"))
        shop.session.commit()
        shop.session.add(shop.Order(name="a"))
        shop.publish(1)
        with pytest.raises(sa.exc.IntegrityError):
            shop.session.commit()
        shop.session.rollback()
        shop.session.add(shop.Order(name="b"))
        shop.publish(2)
        shop.session.commit()
    assert (shop.orders, shop.numbers) == (["a", "b"], [2])


def test_savepoint_rolled_back_takes_only_its_own_rows(shop: OutboxShop) -> None:
    with shop.app.app_context():
        shop.publish(1)
        with suppress(ZeroDivisionError), shop.session.begin_nested():
            shop.publish(2)
            raise ZeroDivisionError
        shop.publish(3)
        savepoint = shop.session.begin_nested()
        shop.publish(4)
        shop.session.flush()
        savepoint.rollback()
        shop.publish(5)
        shop.session.commit()
    assert shop.numbers == [1, 3, 5]


def test_savepoint_released_keeps_its_rows(shop: OutboxShop) -> None:
    with shop.app.app_context():
        with shop.session.begin_nested():
            shop.publish(1)
            with shop.session.begin_nested():
                shop.publish(2)
        shop.publish(3)
        shop.session.commit()
    assert shop.numbers == [1, 2, 3]


def test_released_savepoint_in_one_that_is_rolled_back(shop: OutboxShop) -> None:
    with shop.app.app_context():
        outer = shop.session.begin_nested()
        shop.publish(1)
        with shop.session.begin_nested():
            shop.publish(2)
        outer.rollback()
        shop.publish(3)
        shop.session.commit()
    assert shop.numbers == [3]


def test_released_savepoint_in_a_transaction_that_is_rolled_back(
    shop: OutboxShop, sqlite_begins: None
) -> None:
    with shop.app.app_context():
        with shop.session.begin_nested():
            shop.session.add(shop.Order(name="a"))
            shop.publish(1)
        shop.session.rollback()
        shop.session.commit()
    assert (shop.orders, shop.rows) == ([], [])


def test_row_shares_the_fate_of_the_domain_row_also_where_the_driver_errs(
    sqlite_shop: OutboxShop,
) -> None:
    """Python's SQLite driver begins no transaction for a savepoint, so its release commits."""
    shop = sqlite_shop
    with shop.app.app_context():
        with shop.session.begin_nested():
            shop.session.add(shop.Order(name="a"))
            shop.publish(1)
        shop.session.rollback()
    assert len(shop.orders) == len(shop.rows)


def test_event_id_of_a_savepoint_rolled_back_is_free_again(shop: OutboxShop) -> None:
    with shop.app.app_context():
        savepoint = shop.session.begin_nested()
        shop.publish(1, event_id="one")
        savepoint.rollback()
        receipt = shop.pubsub.publish("order.created", {"n": 2}, event_id="one")
        shop.session.commit()
    assert not receipt.duplicate
    assert shop.numbers == [2]


def test_publish_adds_no_statement_of_its_own(shop: OutboxShop) -> None:
    shop.commit(0)  # the first one looks whether the tables are there
    with shop.app.app_context(), shop.counting() as statements:
        shop.session.add(shop.Order(name="a"))
        shop.publish(1)
        shop.publish(2)
        assert statements == []
        shop.session.commit()
    assert len(statements) == 2, statements
    (written,) = (text for text in statements if "natspubsub_outbox" in text)
    assert "RETURNING" not in written, "nobody needs what the database would have to send back"
    assert shop.numbers == [0, 1, 2]


# --- event ids given twice


def test_event_id_given_twice_is_one_row(shop: OutboxShop) -> None:
    def publish() -> bool:
        return shop.pubsub.publish("order.created", {"n": 1}, event_id="one").duplicate

    with shop.app.app_context():
        assert not publish()
        assert publish()
        shop.session.flush()
        assert publish()
        shop.session.commit()
        assert publish()
        shop.session.commit()
    with shop.app.app_context():
        assert publish()
        shop.session.commit()
    assert shop.numbers == [1]


def test_event_id_given_twice_in_one_call(shop: OutboxShop) -> None:
    with shop.app.app_context():
        receipts = shop.pubsub.publish_many(
            [("order.created", {"n": n}, {"event_id": "one"}) for n in (1, 2)]
            + [("order.created", {"n": 3}), ("order.created", {"n": 4}, {"event_id": "two"})]
        )
        shop.session.commit()
    assert [receipt.duplicate for receipt in receipts] == [False, True, False, False]
    assert shop.numbers == [1, 3, 4]


def test_event_ids_are_told_apart_by_case(shop: OutboxShop) -> None:
    with shop.app.app_context():
        first = shop.pubsub.publish("order.created", {"n": 1}, event_id="order-a")
        second = shop.pubsub.publish("order.created", {"n": 2}, event_id="order-A")
        shop.session.commit()
        assert not shop.pubsub.publish("a.b", {"n": 3}, event_id="ORDER-A").duplicate
        assert (first.duplicate, second.duplicate) == (False, False)
        shop.session.commit()
    assert shop.numbers == [1, 2, 3]


def test_longest_event_id(shop: OutboxShop) -> None:
    shop.commit(1, event_id="x" * 255, ordering_key="y" * 255)
    assert shop.relay().run_once() == 1


def test_many_event_ids_are_looked_up_together(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    shop.commit(0)
    items = [("order.created", {"n": n}, {"event_id": f"id-{n}"}) for n in range(1200)]
    with shop.app.app_context():
        with shop.counting() as statements:
            shop.pubsub.publish_many(items)
        assert len(statements) == 3
        shop.session.commit()
        again = shop.pubsub.publish_many(items)
        assert all(receipt.duplicate for receipt in again)


def test_event_id_published_at_the_same_time_by_another(shop: OutboxShop) -> None:
    """The later commit leaves its event out, and loses nothing else."""
    shop.commit(0)
    with shop.app.app_context():
        shop.publish(1)
        shop.publish(2, event_id="one")
        shop.publish(3)
        in_thread(lambda: shop.commit(4, event_id="one"))
        shop.session.add(shop.Order(name="a"))
        shop.session.commit()
    assert (shop.orders, shop.numbers) == (["a"], [0, 4, 1, 3])


def in_thread(action: Callable[[], object]) -> None:
    """Do it in a thread of its own, and let what it raises through."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    if errors:
        raise errors[0]


# --- several at once


def test_publish_many_batch_and_list_of_topics(shop: OutboxShop) -> None:
    with shop.app.app_context():
        shop.pubsub.publish_many([("a.b", {"n": 1}), ("a.b", {"n": 2}, {"ordering_key": "k"})])
        with shop.pubsub.batch() as batch:
            batch.publish("a.b", {"n": 3})
            batch.publish(["a.b", "c.d"], {"n": 4})
        receipts = shop.pubsub.publish(["a.b", "c.d"], {"n": 5}, event_id="five")
        shop.session.commit()
    assert [receipt.status for receipt in batch.receipts] == ["outbox"] * 3
    assert shop.numbers == [1, 2, 3, 4, 4, 5, 5]
    assert [row["event_id"] for row in shop.rows[-2:]] == [one.event_id for one in receipts]
    assert len({one.event_id for one in receipts}) == 2


def test_block_of_a_batch_that_raises_writes_nothing(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    with shop.app.app_context():
        with suppress(ZeroDivisionError), shop.pubsub.batch() as batch:
            batch.publish("a.b", {"n": 1})
            raise ZeroDivisionError
        shop.session.commit()
    assert shop.rows == []


def test_some_through_the_outbox_and_some_directly(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    with shop.app.app_context():
        receipts = shop.pubsub.publish_many(
            [("a.b", {"n": 1}), ("a.b", {"n": 2}, {"outbox": False}), ("a.b", {"n": 3})]
        )
        shop.session.commit()
    assert [one.status for one in receipts] == ["outbox", "stored", "outbox"]
    assert (shop.numbers, shop.sent) == ([1, 3], [2])


def test_outbox_is_chosen_at_the_call(make_shop: MakeShop, sqlite: str) -> None:
    shop = make_shop(sqlite, use_outbox=False)
    with shop.app.app_context():
        assert shop.pubsub.publish("a.b", {"n": 1}).status == "stored"
        assert shop.pubsub.publish("a.b", {"n": 2}, outbox=True).status == "outbox"
        shop.session.commit()
    assert (shop.sent, shop.numbers) == ([1], [2])


def test_publish_nowait_writes_at_once(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    with shop.app.app_context():
        assert shop.pubsub.publish_nowait("a.b", {"n": 1}).result(0).status == "outbox"
        shop.session.commit()
    assert shop.numbers == [1]


def test_async_view_publishes_in_its_own_transaction(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop

    @shop.app.post("/<int:n>")
    async def order(n: int) -> str:
        shop.session.add(shop.Order(name=f"order {n}"))
        await shop.pubsub.publish_async("order.created", {"n": n})
        await asyncio.sleep(0)
        if n == 2:
            shop.session.rollback()
        else:
            shop.session.commit()
        return "ok"

    client = shop.app.test_client()
    for n in (1, 2, 3):
        assert client.post(f"/{n}").status_code == 200
    assert (shop.orders, shop.numbers) == (["order 1", "order 3"], [1, 3])


def test_publishing_inside_a_flush(shop: OutboxShop) -> None:
    """In SQLAlchemy's mapper events nothing may be added to the session."""

    @sa.event.listens_for(shop.Order, "after_insert")
    def created(mapper: object, connection: object, order: Any) -> None:
        shop.publish(int(order.name), event_id=f"order-{order.name}")
        shop.publish(100 + int(order.name), delay=60)

    with shop.app.app_context():
        shop.session.add_all([shop.Order(name="1"), shop.Order(name="2")])
        shop.session.commit()
        shop.session.add(shop.Order(name="3"))
        shop.session.flush()
        shop.session.rollback()
    assert shop.numbers == [1, 101, 2, 102]
    assert [row["available_at"] is None for row in shop.rows] == [True, False, True, False]


# --- errors


class Unencodable:
    pass


@pytest.mark.parametrize(
    ("topic", "message", "options", "error"),
    [
        ("order.*", {"n": 1}, {}, InvalidTopic),
        ("", {"n": 1}, {}, InvalidTopic),
        ("order.created", {"n": Unencodable()}, {}, EncodingError),
        ("order.created", {"n": float("nan")}, {}, EncodingError),
        ("order.created", [1], {}, EncodingError),
        ("order.created", {"n": 1}, {"event_id": "has space"}, EncodingError),
        ("order.created", {"n": 1}, {"ordering_key": "k" * 256}, EncodingError),
        ("order.created", {"n": 1}, {"delay": -1}, EncodingError),
        ("order.created", {"n": 1}, {"available_at": dt.datetime(2030, 1, 1)}, EncodingError),
        ("order.created", {"n": 1}, {"headers": {"Nats-Msg-Id": "x"}}, EncodingError),
        ("order.created", {"text": "x" * 1024 * 1024}, {}, PayloadTooLarge),
    ],
)
def test_bad_message_is_refused_at_once_and_the_session_goes_on(
    sqlite_shop: OutboxShop,
    topic: str,
    message: Any,
    options: dict[str, Any],
    error: type[Exception],
) -> None:
    shop = sqlite_shop
    with shop.app.app_context():
        shop.session.add(shop.Order(name="a"))
        with pytest.raises(error):
            shop.pubsub.publish(topic, message, **options)
        shop.publish(1)
        shop.session.commit()
    assert (shop.orders, shop.numbers) == (["a"], [1])


def test_bad_message_among_many_writes_none(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    with shop.app.app_context():
        with pytest.raises(PayloadTooLarge):
            shop.pubsub.publish_many([("a.b", {"n": 1}), ("a.b", {"text": "x" * 1024 * 1024})])
        shop.session.commit()
    assert shop.rows == []


def test_missing_tables_are_told_at_the_publish(make_shop: MakeShop, new_url: str) -> None:
    shop = make_shop(new_url, tables=False)
    with shop.app.app_context():
        with pytest.raises(TablesMissing, match=r"flask db upgrade.*outbox ddl"):
            shop.publish(1)
        shop.session.rollback()
        shop.db.create_all()
        shop.publish(2)
        shop.session.commit()
    assert shop.numbers == [2]


def test_missing_tables_are_told_by_the_relay(make_shop: MakeShop, new_url: str) -> None:
    shop = make_shop(new_url, tables=False)
    with pytest.raises(TablesMissing, match=r"flask db upgrade.*outbox ddl"):
        shop.relay().run_once()


def test_without_an_app_context(sqlite_shop: OutboxShop) -> None:
    with pytest.raises(ConfigurationError, match=r"with app\.app_context"):
        sqlite_shop.publish(1)


def test_session_that_was_closed_is_used_again(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    with shop.app.app_context():
        shop.publish(1)
        shop.session.close()
        shop.publish(2)
        shop.session.commit()
        shop.session.remove()
        shop.publish(3)
        shop.session.commit()
    assert shop.numbers == [2, 3]


def test_session_that_was_closed_for_good(make_shop: MakeShop, sqlite: str) -> None:
    shop = make_shop(sqlite)
    with shop.app.app_context():
        shop.session.remove()
        shop.session.configure(close_resets_only=False)
        shop.session.close()
        with pytest.raises(sa.exc.InvalidRequestError, match="permanently closed"):
            shop.publish(1)


def test_session_after_an_error_says_that_it_must_be_rolled_back(shop: OutboxShop) -> None:
    with shop.app.app_context():
        shop.session.add(shop.Order(name=None))
        with pytest.raises(sa.exc.DBAPIError):
            shop.session.flush()
        shop.session.rollback()
        shop.publish(1)
        shop.session.commit()
    assert shop.numbers == [1]


def test_read_only_database(make_shop: MakeShop, make_url: Any) -> None:
    url = make_url("sqlite")
    make_shop(url)
    shop = make_shop(
        url.replace("sqlite:///", "sqlite:///file:") + "?mode=ro&uri=true", tables=False
    )
    with shop.app.app_context():
        shop.publish(1)
        with pytest.raises(sa.exc.OperationalError, match="readonly database"):
            shop.session.commit()
    assert shop.rows == []


def test_read_only_transaction(make_shop: MakeShop, postgresql: str) -> None:
    shop = make_shop(postgresql)
    with shop.app.app_context():
        shop.session.execute(sa.text("SET TRANSACTION READ ONLY"))
        shop.publish(1)
        with pytest.raises(sa.exc.InternalError, match="read-only transaction"):
            shop.session.commit()


def test_engine_that_commits_each_statement_is_refused(sqlite: str, env: str) -> None:
    app = Flask("shop")
    app.config.update(
        SQLALCHEMY_DATABASE_URI=sqlite,
        SQLALCHEMY_ENGINE_OPTIONS={"isolation_level": "AUTOCOMMIT"},
        NATSPUBSUB_URLS="memory://",
        NATSPUBSUB_USE_OUTBOX=True,
        NATSPUBSUB_ENV=env,
    )
    db = SQLAlchemy(app)
    pubsub = NatsPubsub(app)
    with app.app_context():
        db.create_all()
        with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
            pubsub.publish("a.b", {"n": 1})
        db.engine.dispose()
    pubsub.shutdown()


def test_outbox_without_a_database_is_refused_at_the_start() -> None:
    app = Flask("shop")
    app.config.update(NATSPUBSUB_URLS="memory://", NATSPUBSUB_USE_OUTBOX=True)
    with pytest.raises(ConfigurationError, match=r"Flask-SQLAlchemy.*NatsPubsub\(app, db=db\)"):
        NatsPubsub(app)


def test_outbox_at_a_call_without_a_database() -> None:
    app = Flask("shop")
    app.config.update(NATSPUBSUB_URLS="memory://")
    pubsub = NatsPubsub(app)
    with app.app_context(), pytest.raises(ConfigurationError, match="need a database"):
        pubsub.publish("a.b", {"n": 1}, outbox=True)
    with pytest.raises(ConfigurationError, match="needs the outbox"):
        pubsub.publish("a.b", {"n": 1}, delay=5)
    pubsub.shutdown()


# --- the wake-up


def test_wakeup_comes_after_the_commit_and_at_no_other_time(shop: OutboxShop) -> None:
    with shop.wakeups() as wakeups, shop.app.app_context():
        shop.publish(1)
        shop.session.flush()
        with shop.session.begin_nested():
            shop.publish(2)
        shop.session.begin_nested().rollback()
        assert wakeups == []
        shop.session.commit()
        assert wakeups == [b""]
        shop.session.add(shop.Order(name="a"))
        shop.session.commit()
        assert wakeups == [b""]


def test_no_wakeup_after_a_rollback(shop: OutboxShop) -> None:
    with shop.wakeups() as wakeups:
        with shop.app.app_context():
            shop.publish(1)
            shop.session.rollback()
            shop.session.add(shop.Order(name="a"))
            shop.session.commit()
            shop.publish(2)
            shop.session.flush()
        assert wakeups == []


def test_wakeup_finds_the_row_committed(shop: OutboxShop) -> None:
    seen: list[int] = []
    listening = shop.broker.listen(
        f"natspubsub.wakeup.{shop.state.settings.env}.shop", lambda _: seen.append(len(shop.rows))
    )
    shop.commit(1)
    shop.commit(2)
    listening.stop()
    assert seen == [1, 2]


def test_wakeup_goes_to_the_app_that_wrote(make_shop: MakeShop, make_url: Any) -> None:
    one, two = make_shop(make_url("sqlite")), make_shop(make_url("sqlite"), app_name="other")
    with one.wakeups() as wakeups_of_one, two.wakeups() as wakeups_of_two:
        one.commit(1)
        assert (wakeups_of_one, wakeups_of_two) == ([b""], [])
        two.commit(2)
        assert (wakeups_of_one, wakeups_of_two) == ([b""], [b""])


# --- publishing directly beside changes


def test_direct_publish_beside_changes_is_warned_about_once(
    make_shop: MakeShop, sqlite: str, caplog: pytest.LogCaptureFixture
) -> None:
    shop = make_shop(sqlite, use_outbox=False)
    with shop.app.app_context():
        shop.publish(1)
        shop.session.add(shop.Order(name="committed"))
        shop.session.commit()
        shop.publish(2)
        assert not caplog.records
        shop.session.add(shop.Order(name="a"))
        shop.session.flush()  # as one does to know its id
        shop.publish(3)
        shop.publish(4)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "outbox=True" in record.getMessage()


@pytest.mark.parametrize("change", ["add", "change", "delete"])
def test_changes_not_flushed_are_warned_about(
    make_shop: MakeShop, sqlite: str, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    shop = make_shop(sqlite, use_outbox=False)
    with shop.app.app_context():
        order = shop.Order(name="a")
        shop.session.add(order)
        if change != "add":
            shop.session.commit()
        if change == "change":
            order.name = "b"
        if change == "delete":
            shop.session.delete(order)
        shop.publish(1)
    assert len(caplog.records) == 1


def test_changes_rolled_back_are_not_warned_about(
    make_shop: MakeShop, sqlite: str, caplog: pytest.LogCaptureFixture
) -> None:
    shop = make_shop(sqlite, use_outbox=False)
    with shop.app.app_context():
        shop.session.add(shop.Order(name="a"))
        shop.session.flush()
        shop.session.rollback()
        shop.publish(1)
    assert not caplog.records


# --- binds


class TwoBinds:
    """An app with a model in each of two databases."""

    def __init__(self, folder: Path, env: str, bind_key: str | None) -> None:
        self.app = Flask("shop")
        self.app.config.update(
            SQLALCHEMY_DATABASE_URI=f"sqlite:///{folder}/default.db",
            SQLALCHEMY_BINDS={"archive": f"sqlite:///{folder}/archive.db"},
            NATSPUBSUB_URLS="memory://",
            NATSPUBSUB_ENV=env,
            NATSPUBSUB_USE_OUTBOX=True,
            NATSPUBSUB_BIND_KEY=bind_key,
        )
        self.db = db = SQLAlchemy(self.app)

        class Order(db.Model):  # type: ignore[name-defined,misc]
            id = sa.Column(sa.Integer, primary_key=True)

        class Archived(db.Model):  # type: ignore[name-defined,misc]
            __bind_key__ = "archive"
            id = sa.Column(sa.Integer, primary_key=True)

        self.Order, self.Archived = Order, Archived
        self.pubsub = NatsPubsub(self.app)
        with self.app.app_context():
            db.create_all()

    def tables(self, bind_key: str | None) -> set[str]:
        with self.app.app_context():
            return set(sa.inspect(self.db.engines[bind_key]).get_table_names())

    def close(self) -> None:
        self.pubsub.shutdown(self.app)
        with self.app.app_context():
            for engine in self.db.engines.values():
                engine.dispose()


@pytest.fixture
def two_binds(tmp_path: Path, env: str, request: pytest.FixtureRequest) -> Any:
    made = TwoBinds(tmp_path, env, request.param)
    yield made
    made.close()


@pytest.mark.parametrize("two_binds", ["archive"], indirect=True)
def test_bind_key_puts_the_outbox_into_that_database(two_binds: TwoBinds) -> None:
    assert "natspubsub_outbox" in two_binds.tables("archive")
    assert "natspubsub_outbox" not in two_binds.tables(None)
    with two_binds.app.app_context():
        two_binds.db.session.add(two_binds.Archived(id=1))
        assert not two_binds.pubsub.publish("a.b", {"n": 1}, event_id="one").duplicate
        two_binds.db.session.commit()
        assert two_binds.pubsub.publish("a.b", {"n": 1}, event_id="one").duplicate
    assert two_binds.pubsub.make_relay().run_once() == 1


@pytest.mark.parametrize("two_binds", [None], indirect=True)
def test_transaction_over_two_databases_is_warned_about_once(
    two_binds: TwoBinds, caplog: pytest.LogCaptureFixture
) -> None:
    session = two_binds.db.session
    with two_binds.app.app_context():
        session.add(two_binds.Order(id=1))
        two_binds.pubsub.publish("a.b", {"n": 1})
        session.execute(sa.select(two_binds.Archived)).all()  # reading does no harm
        session.commit()
        session.add(two_binds.Archived(id=1))
        session.commit()
        assert not caplog.records
        for n in (2, 3):
            session.add(two_binds.Archived(id=n))
            session.flush()
            two_binds.pubsub.publish("a.b", {"n": n})
            session.commit()
    (record,) = caplog.records
    assert "NATSPUBSUB_BIND_KEY" in record.getMessage()


def test_unknown_bind_key(tmp_path: Path, env: str) -> None:
    with pytest.raises(ConfigurationError, match="no model has this __bind_key__"):
        TwoBinds(tmp_path, env, "nowhere")


# --- Flask-SQLAlchemy-Lite


class LiteShop:
    """An app on Flask-SQLAlchemy-Lite, whose models have a metadata of their own."""

    def __init__(self, folder: Path, env: str, **options: Any) -> None:
        class Model(sa.orm.DeclarativeBase):
            pass

        class Order(Model):
            __tablename__ = "orders"
            id = sa.Column(sa.Integer, primary_key=True)

        self.Order, self.metadata = Order, Model.metadata
        self.app = Flask("shop")
        self.app.config.update(
            SQLALCHEMY_ENGINES={
                "default": f"sqlite:///{folder}/default.db",
                "other": f"sqlite:///{folder}/other.db",
            },
            NATSPUBSUB_URLS="memory://",
            NATSPUBSUB_ENV=env,
            NATSPUBSUB_USE_OUTBOX=True,
            **options,
        )
        self.db = Lite(self.app)

    def init(self, metadata: sa.MetaData | None) -> NatsPubsub:
        self.pubsub = NatsPubsub(self.app, metadata=metadata)
        return self.pubsub

    def close(self) -> None:
        with self.app.app_context():
            for engine in self.db.engines.values():
                engine.dispose()


def test_flask_sqlalchemy_lite(tmp_path: Path, env: str) -> None:
    lite = LiteShop(tmp_path, env)
    pubsub = lite.init(lite.metadata)
    with lite.app.app_context():
        lite.metadata.create_all(lite.db.engine)
        session = lite.db.session
        session.add(lite.Order(id=1))
        pubsub.publish("order.created", {"n": 1})
        session.commit()
        session.add(lite.Order(id=2))
        pubsub.publish("order.created", {"n": 2})
        session.rollback()
        with suppress(ZeroDivisionError), session.begin_nested():
            pubsub.publish("order.created", {"n": 3})
            raise ZeroDivisionError
        session.commit()
    assert pubsub.make_relay().run_once() == 1
    pubsub.shutdown()
    lite.close()


def test_flask_sqlalchemy_lite_without_metadata(tmp_path: Path, env: str) -> None:
    lite = LiteShop(tmp_path, env)
    with pytest.raises(ConfigurationError, match=r"init_app\(app, db, Model.metadata\)"):
        lite.init(None)
    lite.close()


def test_session_that_writes_where_the_relay_does_not_read(tmp_path: Path, env: str) -> None:
    """Flask-SQLAlchemy-Lite's session knows nothing of NATSPUBSUB_BIND_KEY."""
    lite = LiteShop(tmp_path, env, NATSPUBSUB_BIND_KEY="other")
    pubsub = lite.init(lite.metadata)
    with lite.app.app_context():
        lite.metadata.create_all(lite.db.engine)
        lite.metadata.create_all(lite.db.get_engine("other"))
        with pytest.raises(ConfigurationError, match=r"default\.db.*other\.db"):
            pubsub.publish("order.created", {"n": 1})
    pubsub.shutdown()
    lite.close()


# --- leaving nothing behind


def test_app_that_is_gone_is_not_kept_by_its_outbox(make_url: Any, env: str) -> None:
    with OutboxShop(make_url("sqlite"), env=env) as shop:
        shop.commit(1)
        app = weakref.ref(shop.app)
    del shop
    gc.collect()
    assert app() is None
