"""Several batches, one behind the other: marked and read while the next is on its way."""

from __future__ import annotations

from typing import Any

import pytest

from flask_natspubsub.outbox.relay import TURN, Relay
from flask_natspubsub.outbox.store import OutboxStore

from .conftest import MakeShop
from .shop import FlakyBroker, OutboxShop
from .test_leases import expire_leases
from .test_relay import LATER, refused, temporary, write


@pytest.fixture
def pairs(make_shop: MakeShop, sqlite: str) -> OutboxShop:
    """A shop whose relay sends two rows at a time."""
    return make_shop(sqlite, outbox_batch_size=2)


def log_of(flaky: FlakyBroker, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done, in order; looks that find nothing are left out."""
    log: list[str] = []
    find, mark = OutboxStore._find_due, OutboxStore.mark

    def looking(store: OutboxStore, connection: Any, names: Any, **values: int) -> object:
        rows = find(store, connection, names, **values)
        log.extend(["read"] * bool(rows and "payload" in names))
        return rows

    def marking(store: OutboxStore, lease: object, sent: object, failed: object) -> bool:
        log.append("mark")
        return mark(store, lease, sent, failed)  # type: ignore[arg-type]

    flaky.before = lambda: log.append("publish")
    monkeypatch.setattr(OutboxStore, "_find_due", looking)
    monkeypatch.setattr(OutboxStore, "mark", marking)
    return log


def test_while_a_batch_is_on_its_way_the_one_before_is_marked_and_the_next_read(
    pairs: OutboxShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = pairs.use_flaky_broker()
    pairs.commit(*range(6))
    log = log_of(flaky, monkeypatch)

    assert pairs.relay().run_once() == 6

    assert log == ["read", "publish", "read", "publish", "mark", "read", "publish", "mark", "mark"]
    assert pairs.sent == list(range(6))


def test_a_batch_read_ahead_costs_four_statements(pairs: OutboxShop) -> None:
    """It is read, what is on its way is compared, and it is marked, fenced by the lease."""
    pairs.commit(*range(6))
    relay = pairs.relay()
    relay.take_leases()

    with pairs.counting() as statements:
        relay.send_batches()

    assert (relay.sent, len(statements)) == (6, 3 * 4)
    relay.release()


def test_a_single_batch_is_marked_at_once(
    pairs: OutboxShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = pairs.use_flaky_broker()
    pairs.commit(1)
    log = log_of(flaky, monkeypatch)

    assert pairs.relay().run_once() == 1

    assert log == ["read", "publish", "mark"]


def test_a_turn_ends(pairs: OutboxShop) -> None:
    """However much there is to send: other partitions and duties wait for it."""
    flaky = pairs.use_flaky_broker()
    pairs.commit(*range(2 * TURN + 4))
    relay = pairs.relay()
    relay.take_leases()

    assert relay.send_batches()
    assert len(flaky.calls) == TURN
    assert relay.sent == 2 * TURN
    assert relay.send_batches()
    assert relay.sent == 2 * TURN + 4
    relay.release()


@pytest.mark.parametrize("error", [temporary, refused])
def test_a_row_read_ahead_of_a_failure_waits_for_it(
    pairs: OutboxShop, error: type[Exception]
) -> None:
    flaky = pairs.use_flaky_broker()
    flaky.failures = {1: [error()]}  # type: ignore[list-item]
    write(pairs, (0, None), (1, "a"), (2, "a"), (3, None), (4, "a"))

    pairs.relay().run_once()

    assert pairs.sent == [0, 3]
    pairs.advance(LATER)
    assert pairs.relay().run_once() == 3
    assert pairs.sent == [0, 3, 1, 2, 4]


def test_a_key_set_free_meanwhile_goes_on_with_its_oldest_row(pairs: OutboxShop) -> None:
    """Once row 0 is marked, row 20 is no longer behind one that waits; but row 1 is due as well."""
    flaky = pairs.use_flaky_broker()
    flaky.failures = {0: [refused()]}
    write(pairs, (0, "a"), (1, "a"))
    pairs.relay().run_once()
    write(pairs, *((number, None) for number in range(10, 14)), (20, "a"), (21, None))
    pairs.advance(LATER)

    assert pairs.relay().run_once() == 8

    assert [number for number in pairs.sent if number in (0, 1, 20)] == [0, 1, 20]


def test_a_transaction_that_commits_meanwhile_stays_in_order(
    make_shop: MakeShop, postgresql: str
) -> None:
    """It has taken an id before those of the batch on its way, and another one behind them."""
    shop = make_shop(postgresql, outbox_batch_size=2)
    flaky = shop.use_flaky_broker()
    with shop.app.app_context():
        shop.publish(0)
        shop.session.flush()
        shop.commit(1, 2, 3, 4)

        def commit() -> None:
            flaky.before = lambda: None
            shop.publish(5)
            shop.session.commit()

        flaky.before = commit
        assert shop.relay().run_once() == 6

    assert shop.sent == [1, 2, 0, 3, 4, 5]


def test_stop_ends_it_after_the_batch_in_hand(pairs: OutboxShop) -> None:
    flaky = pairs.use_flaky_broker()
    pairs.commit(*range(6))
    relay = pairs.relay()
    flaky.before = relay.stop

    assert relay.run_once() == 2

    assert [row["status"] for row in pairs.rows] == ["sent"] * 2 + ["pending"] * 4


def test_a_lease_lost_with_two_batches_in_hand(pairs: OutboxShop) -> None:
    """It stood still before it could mark the first: the other relay's word counts for both."""
    flaky = pairs.use_flaky_broker()
    slow, quick = pairs.relay(), pairs.relay()
    pairs.commit(*range(6))

    def stand_still_at_the_second() -> None:
        if len(flaky.calls) == 2:
            take_over(pairs, flaky, quick)

    flaky.before = stand_still_at_the_second

    assert slow.run_once() == 0

    assert slow.lease_lost == 1
    assert quick.sent == 6
    assert {row["stream"] for row in pairs.rows} == {"by the quick one"}
    assert pairs.sent == list(range(6)), "the stream knows the ids"
    quick.release()


def take_over(shop: OutboxShop, flaky: FlakyBroker, quick: Relay) -> None:
    flaky.before = lambda: None
    expire_leases(shop)
    while quick.step():
        pass
    shop.execute("UPDATE natspubsub_outbox SET stream = 'by the quick one'")
