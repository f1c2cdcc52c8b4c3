"""The relay: order, failures, wake-ups and statements, with a broker that fails on request."""

from __future__ import annotations

import logging
import random
import time
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa

from flask_natspubsub import PublishError
from flask_natspubsub.brokers.base import StoredAck
from flask_natspubsub.brokers.memory.broker import MemoryBroker
from flask_natspubsub.database import adapter
from flask_natspubsub.errors import DatabaseError, NotConnected, PublishDenied
from flask_natspubsub.outbox.housekeeping import Timing
from flask_natspubsub.outbox.relay import Relay
from flask_natspubsub.outbox.upkeep import CLEAN_BATCH
from tests.support.waiting import eventually, for_seconds

from .conftest import MakeShop
from .shop import OutboxShop, is_subsequence

#: Longer than the wait of a row that failed once, or twice.
LATER = 10.0


def temporary() -> PublishError:
    return PublishError("the stream may be full")


def refused() -> PublishError:
    return PublishDenied("the server does not let this user publish")


def write(shop: OutboxShop, *rows: tuple[int, str | None]) -> None:
    """Commit rows of (n, ordering key)."""
    with shop.app.app_context():
        for number, key in rows:
            shop.publish(number, ordering_key=key)
        shop.session.commit()


def relay_all(shop: OutboxShop) -> None:
    """Relay until all is sent, moving the clock over the waits."""
    for _ in range(50):
        with suppress(PublishError):
            shop.relay().run_once()
        if not shop.store.counts()["pending"]:
            return
        shop.advance(LATER)
    raise AssertionError("rows are still pending")


# --- order and outcome


def test_rows_are_sent_in_order_and_marked(shop: OutboxShop) -> None:
    keys = [None, "a", "b", "a", "a", None, "b"]
    write(shop, *((n, keys[n % len(keys)]) for n in range(100)))
    assert shop.relay().run_once() == 100
    assert shop.sent == list(range(100))
    stored = {message.headers["Nats-Msg-Id"]: message for message in shop.stored}
    for row in shop.rows:
        message = stored[row["event_id"]]
        assert row["status"] == "sent"
        assert (row["stream"], row["stream_sequence"]) == (message.stream, message.sequence)
        assert row["created_at"] <= row["sent_at"] <= row["created_at"] + 60
        assert (row["attempts"], row["last_error"]) == (0, None)
    assert shop.relay().run_once() == 0


def test_several_batches(make_shop: MakeShop, sqlite: str) -> None:
    shop = make_shop(sqlite, outbox_batch_size=7)
    flaky = shop.use_flaky_broker()
    shop.commit(*range(20))
    assert shop.relay().run_once() == 20
    assert [len(call) for call in flaky.calls] == [7, 7, 6]
    assert shop.sent == list(range(20))


def test_rows_without_key_are_one_publish_and_a_key_waits_for_its_own(
    sqlite_shop: OutboxShop,
) -> None:
    shop = sqlite_shop
    flaky = shop.use_flaky_broker()
    write(shop, (1, None), (2, "a"), (3, "b"), (4, None), (5, "a"), (6, "c"), (7, "c"))
    shop.relay().run_once()
    assert flaky.calls == [[1, 2, 3, 4], [5, 6], [7]]


@pytest.mark.parametrize("error", [temporary, refused])
def test_key_waits_for_its_row_that_failed_and_others_do_not(shop: OutboxShop, error: Any) -> None:
    flaky = shop.use_flaky_broker()
    flaky.failures = {2: [error()], 4: [error()]}
    write(shop, (1, "a"), (2, "a"), (3, "a"), (4, None), (5, "b"), (6, None), (7, "b"))
    shop.relay().run_once()
    assert shop.sent == [1, 5, 6, 7]
    by_number = dict(zip(shop.numbers, shop.rows, strict=True))
    assert by_number[2]["last_error"] == str(error())
    assert by_number[3]["last_error"] is None
    assert by_number[2]["attempts"] == (0 if error is temporary else 1)
    assert shop.relay().run_once() == 0, "neither the row nor those behind it are due"
    shop.advance(LATER)
    assert shop.relay().run_once() == 3
    assert sorted(shop.sent[4:]) == [2, 3, 4]
    assert shop.sent.index(2) < shop.sent.index(3)


@pytest.mark.parametrize("seed", [5, 6, 7])
@pytest.mark.parametrize("batch_size", [2, 5, 500])
def test_order_by_key_holds_whatever_fails(
    make_shop: MakeShop, sqlite: str, batch_size: int, seed: int
) -> None:
    shop = make_shop(sqlite, outbox_batch_size=batch_size)
    flaky = shop.use_flaky_broker()
    dice = random.Random(seed)
    number = 0
    for _ in range(25):
        rows = []
        for _ in range(dice.randrange(1, 15)):
            rows.append((number, dice.choice([None, "a", "b", "c"])))
            number += 1
        for failing, _ in dice.sample(rows, dice.randrange(len(rows))):
            flaky.failures[failing] = [
                dice.choice([temporary, refused])() for _ in range(dice.randrange(1, 3))
            ]
        write(shop, *rows)
        try:
            shop.relay().run_once()
        except PublishError:
            shop.advance(LATER)
    relay_all(shop)
    assert sorted(shop.sent) == list(range(number))
    keys = {n: row["ordering_key"] for n, row in zip(shop.numbers, shop.rows, strict=True)}
    for key in ("a", "b", "c"):
        ours = [n for n in shop.sent if keys[n] == key]
        assert ours == sorted(ours)


def test_refused_row_is_parked_and_lets_its_key_go_on(make_shop: MakeShop, url: str) -> None:
    shop = make_shop(url, outbox_max_attempts=3)
    flaky = shop.use_flaky_broker()
    flaky.failures[1] = [refused() for _ in range(3)]
    write(shop, (1, "a"), (2, "a"), (3, "b"))
    for attempt in (1, 2):
        shop.relay().run_once()
        assert (shop.sent, shop.rows[0]["attempts"]) == ([3], attempt)
        assert shop.rows[0]["status"] == "pending"
        shop.advance(LATER)
    shop.relay().run_once()
    row = shop.rows[0]
    assert (row["status"], row["attempts"]) == ("parked", 3)
    assert "does not let this user publish" in row["last_error"]
    shop.advance(LATER)
    shop.relay().run_once()
    assert shop.sent == [3, 2]
    shop.advance(3600)
    assert shop.relay().run_once() == 0
    assert shop.store.retry() == 1
    shop.relay().run_once()
    assert shop.sent == [3, 2, 1]


def test_refused_row_waits_longer_each_time(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    shop.use_flaky_broker().failures[1] = [refused() for _ in range(9)]
    write(shop, (1, None))
    waits = []
    for _ in range(9):
        shop.relay().run_once()
        now = shop.execute(sa.select(shop.state.persistence.database.now()))[0][0]  # type: ignore[union-attr]
        waits.append(shop.rows[0]["available_at"] - now)
        shop.advance(400)
    expected = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for wait, base in zip(waits, expected, strict=True):
        assert base * 0.8 - 1 < wait < base * 1.2 + 1


def test_temporary_faults_never_park(make_shop: MakeShop, sqlite: str) -> None:
    shop = make_shop(sqlite, outbox_max_attempts=1)
    flaky = shop.use_flaky_broker()
    flaky.failures[0] = [temporary() for _ in range(30)]
    shop.commit(0)
    for n in range(1, 31):
        shop.commit(n)
        shop.relay().run_once()
        shop.advance(LATER)
    row = shop.rows[0]
    assert (row["status"], row["attempts"]) == ("pending", 0)
    assert shop.sent == list(range(1, 31))
    relay_all(shop)
    assert shop.sent[-1] == 0


def test_row_too_large_for_the_server_holds_nobody_up(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    with shop.app.app_context():
        shop.publish(1)
        shop.pubsub.publish("order.created", {"n": 2, "text": "x" * 5000})
        shop.publish(3)
        shop.session.commit()
    smaller = MemoryBroker(max_payload=2000)
    smaller.want(shop.state.streams())
    replaced = shop.state.use_broker(smaller)
    shop.relay().run_once()
    assert shop.sent == [1, 3]
    assert "the server takes 2,000" in shop.rows[1]["last_error"]
    assert shop.rows[1]["attempts"] == 1
    assert replaced is not None
    replaced.close()


def test_stored_before_it_could_be_marked(shop: OutboxShop, monkeypatch: Any) -> None:
    """Killed in between, or the database away: it is sent again, under the same id."""
    shop.commit(1, 2)
    relay = shop.relay()

    def away(*_: object) -> bool:
        raise DatabaseError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(type(shop.store), "mark", away)
        with pytest.raises(DatabaseError):
            relay.run_once()
    assert shop.sent == [1, 2]
    assert [row["status"] for row in shop.rows] == ["pending"] * 2
    shop.commit(3)
    assert shop.relay().run_once() == 3
    assert shop.sent == [1, 2, 3]
    assert [row["stream_sequence"] for row in shop.rows] == [1, 2, 3]


def test_rows_of_partitions_that_are_no_more(make_shop: MakeShop, url: str) -> None:
    shop = make_shop(url, outbox_partitions=4)
    rows = [(n, f"key-{n % 5}") for n in range(40)]
    write(shop, *rows)
    fewer = make_shop(url, env=shop.state.settings.env, outbox_partitions=1)
    write(fewer, *((n, f"key-{n % 5}") for n in range(40, 60)))
    relay_all(fewer)
    assert sorted(fewer.sent) == list(range(60))
    for key in range(5):
        assert is_subsequence(range(key, 60, 5), fewer.sent)


def test_rows_of_partitions_that_the_relay_does_not_know_yet_take_seconds(
    make_shop: MakeShop, url: str
) -> None:
    """The web processes of a deploy that raises the number are there before the workers."""
    before = make_shop(url, outbox_partitions=1)
    before.commit(0)
    before.start_relay()
    before.wait_for_sent(1)
    shop = make_shop(url, env=before.state.settings.env, outbox_partitions=4)
    write(shop, *((n, f"key-{n % 5}") for n in range(1, 21)))
    before.wait_for_sent(21, 3 * Timing().adopt)
    for key in range(5):
        assert is_subsequence(range(key or 5, 21, 5), before.sent)


def test_rows_of_a_partition_that_another_relay_has_are_left_to_it(
    make_shop: MakeShop, url: str
) -> None:
    shop = make_shop(url, outbox_partitions=4)
    write(shop, *((n, f"key-{n % 5}") for n in range(20)))
    partitions = {row["partition"] for row in shop.rows}
    theirs = max(partitions)
    assert theirs > 0
    lease = shop.store.leases.acquire(f"outbox/{theirs}", "a process of the new version")
    fewer = make_shop(url, env=shop.state.settings.env, outbox_partitions=1)
    fewer.relay().run_once()
    left = [row["partition"] for row in shop.rows if row["status"] == "pending"]
    assert set(left) == {theirs}
    shop.store.leases.release(lease)
    fewer.relay().run_once()
    assert sorted(fewer.sent) == list(range(20))


def test_key_waits_for_its_rows_in_another_partition(make_shop: MakeShop, url: str) -> None:
    """They were written before there were more partitions, and another relay may have those."""
    before = make_shop(url, outbox_partitions=1)
    write(before, *((n, f"key-{n % 5}") for n in range(20)))
    shop = make_shop(url, env=before.state.settings.env, outbox_partitions=4)
    write(shop, *((n, f"key-{n % 5}") for n in range(20, 40)))
    write(shop, *((n, f"new-{n % 5}") for n in range(40, 60)))
    lease = shop.store.leases.acquire("outbox/0", "another")
    relay = shop.relay()
    relay.run_once()
    assert min(shop.sent) >= 40, "what has no row in partition 0"
    shop.store.leases.release(lease)
    for _ in range(3):
        shop.relay().run_once()
    assert sorted(shop.sent) == list(range(60))
    for key in range(5):
        assert is_subsequence(range(key, 40, 5), shop.sent)


# --- when rows are due


def test_delayed_row_is_due_by_the_clock_of_the_database(shop: OutboxShop) -> None:
    with shop.app.app_context():
        shop.publish(1, delay=60)
        shop.publish(2)
        shop.session.commit()
    shop.relay().run_once()
    assert shop.sent == [2]
    assert shop.relay().is_idle()
    shop.advance(58)
    assert shop.relay().run_once() == 0
    shop.advance(3)
    assert not shop.relay().is_idle()
    shop.relay().run_once()
    assert shop.sent == [2, 1]


def test_key_waits_for_its_row_that_is_delayed(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    with shop.app.app_context():
        shop.publish(1, delay=60, ordering_key="a")
        shop.publish(2, ordering_key="a")
        shop.publish(3, ordering_key="b")
        shop.session.commit()
    shop.relay().run_once()
    assert shop.sent == [3]
    shop.advance(61)
    shop.relay().run_once()
    assert shop.sent == [3, 1, 2]


def test_age_of_the_oldest_row_that_is_due(make_shop: MakeShop, url: str) -> None:
    shop = make_shop(url, outbox_partitions=8)
    assert shop.store.oldest_pending_age() is None
    shop.commit(1, delay=60)
    assert shop.store.oldest_pending_age() is None
    shop.commit(*range(2, 30))
    table = shop.store.table
    of_one = sa.update(table).where(
        table.c.partition == shop.rows[-1]["partition"], table.c.available_at.is_(None)
    )
    shop.execute(of_one.values(created_at=table.c.created_at - 100))
    assert 100 <= shop.store.oldest_pending_age() < 130
    shop.execute(of_one.values(status="sent"))
    assert 0 <= shop.store.oldest_pending_age() < 30


# --- a relay in a thread


def wait_for_lease(relay: Relay, partitions: int = 1) -> None:
    eventually(lambda: len(relay.partitions) == partitions, 10, "no lease was taken")


def test_wakeup_wakes_the_relay(make_shop: MakeShop, url: str) -> None:
    shop = make_shop(url, outbox_poll_interval=60)
    wait_for_lease(shop.start_relay())
    for n in range(3):
        began = time.monotonic()
        shop.commit(n)
        shop.wait_for_sent(n + 1, 2)
        assert time.monotonic() - began < 2


def test_wakeup_that_is_lost_does_no_harm(make_shop: MakeShop, sqlite: str) -> None:
    shop = make_shop(sqlite, outbox_poll_interval=0.2)
    shop.use_flaky_broker().loses_wakeups = True
    wait_for_lease(shop.start_relay())
    shop.commit(1)
    shop.wait_for_sent(1, 3)


def test_broker_away_leaves_the_rows_as_they_are(make_shop: MakeShop, sqlite: str) -> None:
    shop = make_shop(sqlite, outbox_poll_interval=0.1)
    broker = shop.broker
    assert isinstance(broker, MemoryBroker)
    broker.disconnect()
    shop.commit(*range(300))
    with pytest.raises(NotConnected):
        shop.relay().run_once()
    before = shop.rows
    wait_for_lease(shop.start_relay())
    with shop.counting() as statements:
        for_seconds(3, lambda: None)
        statements = list(statements)
    written = [one for one in statements if not one.startswith("SELECT")]
    assert all("natspubsub_lease" in one for one in written)
    assert len(written) <= 2, "renewals of the lease"
    assert len(statements) <= 8, "a look a second"
    assert shop.rows == before
    broker.reconnect()
    shop.wait_for_sent(300)
    shop.wait_until_marked()
    assert shop.sent == list(range(300))


def test_relay_survives_what_nobody_foresaw(
    make_shop: MakeShop, sqlite: str, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    shop = make_shop(sqlite)
    errors: list[Exception] = [RuntimeError("unforeseen"), DatabaseError("gone")]
    due = type(shop.store).due

    def failing(*arguments: Any) -> Any:
        if errors:
            raise errors.pop(0)
        return due(*arguments)

    monkeypatch.setattr(type(shop.store), "due", failing)
    relay = shop.start_relay()
    shop.commit(1)
    shop.wait_for_sent(1)
    assert relay.is_alive
    assert [record.exc_info is not None for record in caplog.records if record.levelno > 20] == [
        True,
        False,
    ]
    shop.stop_relay(relay)
    assert not relay.is_alive


def test_relay_goes_on_after_its_connections_were_cut(make_shop: MakeShop, postgresql: str) -> None:
    shop = make_shop(postgresql, outbox_poll_interval=0.1)
    # A pool of its own: disposing of the relay's would leak what the relay holds at that moment.
    writer = make_shop(postgresql)
    wait_for_lease(shop.start_relay())
    for n in range(3):
        cut_connections(postgresql)
        writer.engine.dispose()
        writer.commit(n)
        shop.wait_for_sent(n + 1)
    shop.wait_until_marked()
    assert shop.sent == [0, 1, 2]


def test_relay_gives_up_a_statement_that_stalls(
    make_shop: MakeShop,
    postgresql: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert adapter.STATEMENT_TIMEOUT <= 30
    monkeypatch.setattr(adapter, "STATEMENT_TIMEOUT", 0.3)
    shop = make_shop(postgresql, outbox_poll_interval=0.1)
    wait_for_lease(shop.start_relay())
    locker = sa.create_engine(postgresql, poolclass=sa.NullPool)
    with locker.begin() as connection:
        connection.exec_driver_sql("LOCK TABLE natspubsub_outbox IN ACCESS EXCLUSIVE MODE")
        eventually(lambda: "statement timeout" in caplog.text, 20)
    shop.commit(1)
    shop.wait_for_sent(1)


def cut_connections(url: str) -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


# --- statements


def without_time_limits(statements: list[str]) -> list[str]:
    """Leave out what PostgreSQL is told before each transaction."""
    return [one for one in statements if not one.startswith("SET LOCAL statement_timeout")]


def test_batch_costs_three_statements_whatever_its_size(shop: OutboxShop) -> None:
    for size in (1, 200):
        write(shop, *((n, None) for n in range(size)))
        relay = shop.relay()
        shop.execute("DELETE FROM natspubsub_lease")
        assert shop.store.due(0, 1)
        relay.take_leases()
        with shop.counting() as statements:
            assert relay.step() == size
        select, renew, mark = without_time_limits(statements)
        assert select.startswith("SELECT")
        assert "natspubsub_outbox" in select
        assert renew.startswith("UPDATE natspubsub_lease")
        assert mark.startswith("UPDATE natspubsub_outbox")
        relay.release()


def test_failures_of_a_batch_are_one_statement(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    shop.use_flaky_broker().failures = {n: [refused()] for n in range(50)}
    shop.commit(*range(100))
    relay = shop.relay()
    relay.take_leases()
    with shop.counting() as statements:
        assert relay.step() == 50
    assert len(statements) == 4
    relay.release()


def test_a_batch_of_which_all_were_refused_is_not_the_last(
    make_shop: MakeShop, sqlite: str
) -> None:
    shop = make_shop(sqlite, outbox_batch_size=10)
    shop.use_flaky_broker().failures = {n: [refused()] for n in range(20)}
    shop.commit(*range(30))
    assert shop.relay().run_once() == 10


@pytest.mark.parametrize(("poll", "limit"), [(60.0, 6), (0.5, 13)])
def test_idle_relay_looks_as_often_as_it_was_told(
    make_shop: MakeShop, sqlite: str, poll: float, limit: int
) -> None:
    shop = make_shop(sqlite, outbox_poll_interval=poll)
    wait_for_lease(shop.start_relay())
    eventually(lambda: shop.store.leases.holders())
    with shop.counting() as statements:
        for_seconds(3.5, lambda: None)
        statements = list(statements)
    assert 1 <= len(statements) <= limit, statements


def test_stand_by_only_looks(make_shop: MakeShop, sqlite: str) -> None:
    shop = make_shop(sqlite)
    active, stand_by = shop.relay(), shop.relay()
    active.take_leases()
    with shop.counting() as statements:
        stand_by.take_leases()
        stand_by.take_leases()
    (look,) = statements
    assert look.startswith("SELECT natspubsub_lease")
    active.release()


def test_rows_are_found_by_an_index(make_shop: MakeShop, url: str) -> None:
    """However many rows have been sent, or wait in other partitions."""
    shop = make_shop(url, outbox_partitions=2)
    fill_with_sent_rows(shop, 4000, time.time())
    write(shop, *((n, f"key-{n % 7}" if n % 2 else None) for n in range(200)))
    shop.execute({"mysql": "ANALYZE TABLE natspubsub_outbox"}.get(shop.engine.name, "ANALYZE"))
    with shop.explaining() as plans:
        rows = shop.store.due(0, 100)
        shop.store.oldest_pending_age()
        lease = shop.store.leases.acquire("outbox/0", "me")
        assert shop.store.mark(lease, {rows[0].id: StoredAck("stream", 1)}, {})
        shop.store.purge("sent", 3600)
    due, oldest, *_, mark, purge = plans
    # MySQL has no partial indexes: there, one has all rows.
    pending = "delayed" if shop.engine.name == "mysql" else "pending"
    assert f"ix_natspubsub_outbox_{pending}" in due
    assert "ix_natspubsub_outbox_delayed" in due
    assert "ix_natspubsub_outbox_key" in due
    assert "ix_natspubsub_outbox_pending" in oldest
    assert "ix_natspubsub_outbox_pending" not in mark, "all rows pending, for each of the batch"
    assert "ix_natspubsub_outbox_sent" in purge
    for plan in (due, oldest, purge):
        assert "Seq Scan" not in plan
        assert "SCAN natspubsub_outbox" not in plan


def fill_with_sent_rows(shop: OutboxShop, count: int, sent_at: float = 0.0) -> None:
    """Insert rows that look as if they had been sent long ago."""
    rows = [
        {
            "event_id": f"sent-{sent_at}-{n}", "subject": "x", "headers": "{}", "payload": b"{}",
            "partition": 0, "status": "sent", "sent_at": sent_at,
        }
        for n in range(count)
    ]  # fmt: skip
    with shop.engine.begin() as connection:
        connection.execute(sa.insert(shop.store.table), rows)


# --- clean-up


def test_rows_are_deleted_only_when_they_were_sent_long_ago(shop: OutboxShop) -> None:
    shop.commit(*range(5))
    shop.relay().run_once()
    fill_with_sent_rows(shop, CLEAN_BATCH + 50)
    shop.commit(*range(5, 10))
    shop.execute("UPDATE natspubsub_outbox SET created_at = 0")
    assert shop.store.purge("sent", 3600) == CLEAN_BATCH
    assert shop.store.purge("sent", 3600) == 50
    assert shop.store.purge("sent", 3600) == 0
    assert shop.store.counts()["pending"] == shop.store.counts()["sent"] == 5
    assert shop.store.purge("sent", 0) == 5
    assert shop.store.counts()["pending"] == 5


def test_relay_cleans_up_also_while_it_is_busy(make_shop: MakeShop, sqlite: str) -> None:
    shop = make_shop(sqlite, outbox_retention=3600)
    relay = shop.relay()
    relay.housekeeping.timing = Timing(clean=0.2)
    fill_with_sent_rows(shop, 2 * CLEAN_BATCH + 500)
    shop.commit(1, delay=3600)
    with shop.counting() as statements:
        shop.start_relay(relay)
        n = 10

        def is_clean() -> bool:
            nonlocal n
            n += 1
            shop.commit(n)
            return bool(shop.store.counts()["sent"] < CLEAN_BATCH // 2)

        eventually(is_clean, 15)
        statements = list(statements)
    deletes = [one for one in statements if one.startswith("DELETE FROM natspubsub_outbox")]
    assert len(deletes) == 3
    eventually(lambda: shop.store.counts()["pending"] == 1)
    assert shop.count_stored() == n - 10


def test_lease_of_a_partition_that_nobody_has(shop: OutboxShop) -> None:
    """The lease row may be deleted at any time, as by tests that empty all tables."""
    relay = shop.relay()
    relay.take_leases()
    shop.execute("DELETE FROM natspubsub_lease")
    shop.commit(1)
    assert relay.run_once() == 0
    assert relay.lease_lost == 1
    assert relay.run_once() == 1


def test_relayed_rows_are_counted_by_a_signal(sqlite_shop: OutboxShop) -> None:
    from flask_natspubsub import outbox_relayed

    counts: list[int] = []

    def count(_app: object, count: int) -> None:
        counts.append(count)
        raise RuntimeError("receivers may fail")

    with outbox_relayed.connected_to(count, sqlite_shop.app):
        sqlite_shop.commit(1, 2, 3)
        sqlite_shop.relay().run_once()
    assert counts == [3]


def test_log_says_what_is_wrong_once_in_a_while(
    make_shop: MakeShop, sqlite: str, caplog: pytest.LogCaptureFixture
) -> None:
    shop = make_shop(sqlite, outbox_poll_interval=0.02)
    relay = shop.relay()
    relay.pause = 0.02
    broker = shop.broker
    assert isinstance(broker, MemoryBroker)
    broker.disconnect()
    shop.commit(1)
    with shop.counting() as statements:
        shop.start_relay(relay)
        eventually(lambda: len(statements) > 20)
    warnings = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warnings) == 1
