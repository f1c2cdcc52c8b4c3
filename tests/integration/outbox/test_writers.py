"""Many writers at once, on PostgreSQL: nothing is skipped, whatever commits when."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
import sqlalchemy as sa

from flask_natspubsub.outbox.relay import Relay
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

from .conftest import MakeShop
from .shop import OutboxShop, message_of
from .test_relay import wait_for_lease

TORTURE = os.environ.get("TORTURE") == "1"


def test_row_of_a_long_transaction_is_sent_once_after_its_commit(
    make_shop: MakeShop, postgresql: str
) -> None:
    """Its id is lower than that of rows which were sent long before."""
    shop = make_shop(postgresql, outbox_poll_interval=0.1)
    wait_for_lease(shop.start_relay())
    with shop.app.app_context():
        shop.publish(1)
        shop.session.flush()
        shop.commit(*range(2, 50))
        shop.wait_for_sent(48)
        shop.wait_until_marked()
        assert 1 not in shop.sent
        shop.session.commit()
    shop.wait_for_sent(49)
    shop.wait_until_marked()
    assert shop.sent == [*range(2, 50), 1]
    assert shop.numbers == list(range(1, 50))


def test_no_row_is_skipped(
    make_shop: MakeShop,
    postgresql: str,
    nats_server: NatsServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Writers with transactions of random length, which commit out of the order of their ids."""
    writers, transactions, longest = (50, 700, 0.3) if TORTURE else (25, 16, 0.05)
    shop = make_shop(postgresql, urls=nats_server.url, outbox_poll_interval=0.05)
    relay = shop.start_relay()
    wait_for_lease(relay)
    committed: list[list[int]] = [[] for _ in range(writers)]

    def write(writer: int) -> None:
        dice = random.Random(writer)
        pause = threading.Event()
        for number in range(transactions):
            first = writer * 1_000_000 + number * 10
            numbers = list(range(first, first + dice.randrange(1, 6)))
            with shop.app.app_context():
                for one in numbers:
                    shop.publish(one, ordering_key=f"writer-{writer}" if writer % 2 else None)
                    shop.session.flush()
                pause.wait(dice.random() * longest)
                if dice.random() < 0.2:
                    shop.session.rollback()
                else:
                    shop.session.commit()
                    committed[writer] += numbers

    in_threads([lambda writer=one: write(writer) for one in range(writers)])
    total = sum(map(len, committed))
    shop.wait_for_sent(total, 60)
    shop.wait_until_marked()
    sent = shop.sent if not TORTURE else sent_by_rows(shop)
    assert len(sent) == shop.count_stored() == total
    assert set(sent) == {number for numbers in committed for number in numbers}
    for writer, numbers in enumerate(committed):
        assert [one for one in sent if one // 1_000_000 == writer] == numbers
    assert relay.lease_lost == 0
    with capsys.disabled():
        print(f"\n{writers} writers: {total:,} rows committed, {len(sent):,} stored, 0 skipped")


def in_threads(actions: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)


def sent_by_rows(shop: OutboxShop) -> list[int]:
    """As ``shop.sent``, by the sequences that were kept: quicker for many."""
    rows = sorted(shop.rows, key=lambda row: row["stream_sequence"])
    return [message_of(row["payload"])["n"] for row in rows]


def test_commit_whose_connection_is_cut(
    make_shop: MakeShop, postgresql: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody can say whether it was committed, but the event is there if the order is."""
    kills = 100 if TORTURE else 20
    shop = make_shop(postgresql)
    dice = random.Random(7)
    killer = sa.create_engine(postgresql, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with killer.connect() as connection:
        for number in range(kills):
            with shop.app.app_context(), suppress(sa.exc.DBAPIError):
                shop.session.add(shop.Order(name=str(number)))
                shop.publish(number)
                shop.session.flush()
                pid = shop.session.scalar(sa.text("SELECT pg_backend_pid()"))
                cut = threading.Timer(dice.random() * 0.002, terminate, (connection, pid))
                cut.start()
                try:
                    shop.session.commit()
                finally:
                    cut.join()
            shop.engine.dispose()  # it may have been cut after the commit
    shop.relay().run_once()
    assert [str(number) for number in shop.sent] == shop.orders
    with capsys.disabled():
        print(f"\n{kills} commits cut: {len(shop.orders)} orders, {len(shop.sent)} messages")


def terminate(connection: sa.Connection, pid: int) -> None:
    connection.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})


def test_writers_on_sqlite_and_a_relay_do_not_lock_each_other_out(
    make_shop: MakeShop, sqlite: str
) -> None:
    shop = make_shop(sqlite, outbox_poll_interval=0.02, outbox_batch_size=20)
    relay: Relay = shop.start_relay()
    wait_for_lease(relay)

    def write(writer: int) -> None:
        for number in range(30):
            shop.commit(writer * 1000 + number)

    in_threads([lambda writer=one: write(writer) for one in range(6)])
    shop.wait_for_sent(180)
    shop.wait_until_marked()
    assert len(shop.sent) == 180
    for writer in range(6):
        ours = [n for n in shop.sent if n // 1000 == writer]
        assert ours == sorted(ours)


@pytest.mark.parametrize("how", ["commit", "rollback"])
def test_same_event_id_in_two_open_transactions(
    make_shop: MakeShop, postgresql: str, how: str
) -> None:
    """The second one waits at its flush for what becomes of the first, and loses nothing else."""
    shop = make_shop(postgresql)

    def second() -> None:
        with shop.app.app_context():
            shop.session.add(shop.Order(name="second"))
            shop.publish(2, event_id="one")
            shop.session.commit()

    with shop.app.app_context():
        shop.session.add(shop.Order(name="first"))
        shop.publish(1, event_id="one")
        shop.session.flush()
        thread = threading.Thread(target=second)
        thread.start()
        eventually(lambda: is_waiting_for_a_lock(shop))
        getattr(shop.session, how)()
    thread.join(20)
    if how == "commit":
        assert (shop.orders, shop.numbers) == (["first", "second"], [1])
    else:
        assert (shop.orders, shop.numbers) == (["second"], [2])


def test_one_event_id_published_by_many_at_once(make_shop: MakeShop, url: str) -> None:
    """As a double click does; each has a row of its own as well."""
    shop, writers = make_shop(url), 4
    barrier = threading.Barrier(writers)

    def write(writer: int) -> None:
        with shop.app.app_context():
            shop.session.add(shop.Order(name=str(writer)))
            shop.publish(writer, event_id="one")
            barrier.wait(20)
            shop.session.commit()

    in_threads([lambda writer=one: write(writer) for one in range(writers)])
    assert sorted(shop.orders) == ["0", "1", "2", "3"]
    assert len(shop.rows) == 1


def is_waiting_for_a_lock(shop: OutboxShop) -> bool:
    query = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return bool(shop.execute(query)[0][0])
