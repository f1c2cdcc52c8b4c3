"""What the relay reads together is bounded in bytes, besides the number of rows."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator

import pytest

from flask_natspubsub.outbox import store

from .conftest import MakeShop
from .shop import OutboxShop, numbers_of

BOUND = 100_000
#: Ten of them are more than the bound, nine are not.
TENTH = BOUND // 10


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that are read together, fewer than usual."""
    monkeypatch.setattr(store, "BATCH_BYTES", BOUND)
    return BOUND


@pytest.fixture
def traced() -> Iterator[None]:
    """Have the memory that is taken noted."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


def write(shop: OutboxShop, sizes: list[int], keys: list[str | None] | None = None) -> None:
    """Commit rows whose payloads have at least so many bytes, numbered from 0."""
    with shop.app.app_context():
        for n, (size, key) in enumerate(zip(sizes, keys or [None] * len(sizes), strict=True)):
            shop.pubsub.publish("order.created", {"n": n, "pad": "x" * size}, ordering_key=key)
        shop.session.commit()


def sizes_of(shop: OutboxShop) -> list[int]:
    """Bytes that each row carries, by number."""
    return [len(row["payload"]) + len(row["headers"]) for row in shop.rows]


@pytest.mark.usefixtures("bound")
def test_large_rows_are_read_in_several_batches_and_sent_in_order(shop: OutboxShop) -> None:
    flaky = shop.use_flaky_broker()
    write(shop, [TENTH] * 45)
    sizes = sizes_of(shop)

    assert shop.relay().run_once() == 45

    assert [len(call) for call in flaky.calls] == [9] * 5
    assert all(sum(sizes[n] for n in call) <= BOUND for call in flaky.calls)
    assert shop.sent == list(range(45))
    assert [message.data for message in shop.stored] == [bytes(r["payload"]) for r in shop.rows]


@pytest.mark.usefixtures("bound")
def test_a_row_larger_than_the_bound_gets_through_by_itself(shop: OutboxShop) -> None:
    flaky = shop.use_flaky_broker()
    write(shop, [3 * BOUND, 10, 10, 3 * BOUND, 3 * BOUND, 10])

    assert shop.relay().run_once() == 6

    assert flaky.calls == [[0], [1, 2], [3], [4], [5]]
    assert shop.sent == list(range(6))
    assert [message.data for message in shop.stored] == [bytes(r["payload"]) for r in shop.rows]


@pytest.mark.usefixtures("bound")
def test_small_and_large_rows_keep_their_order_and_what_they_carry(
    make_shop: MakeShop, url: str
) -> None:
    """With 50 in a batch, those below a fiftieth of the bound are read with their row."""
    shop = make_shop(url, outbox_batch_size=50)
    flaky = shop.use_flaky_broker()
    write(shop, [10, TENTH // 2, 4 * TENTH, 100, 7 * TENTH] * 6)
    sizes = sizes_of(shop)

    assert shop.relay().run_once() == 30

    assert len(flaky.calls) > 6
    assert all(sum(sizes[n] for n in call) <= BOUND for call in flaky.calls)
    assert shop.sent == list(range(30))
    assert [message.data for message in shop.stored] == [bytes(r["payload"]) for r in shop.rows]


@pytest.mark.usefixtures("bound")
def test_rows_of_a_key_stay_in_order_over_several_batches(shop: OutboxShop) -> None:
    keys = [None, "a", "b", "a", None]
    write(shop, [4 * TENTH] * 20, keys * 4)

    assert shop.relay().run_once() == 20

    for key in ("a", "b"):
        of_key = [n for n in range(20) if keys[n % 5] == key]
        assert [n for n in shop.sent if n in of_key] == of_key
    assert sorted(shop.sent) == list(range(20))


@pytest.mark.usefixtures("bound")
def test_what_is_read_ahead_is_bounded_as_well(make_shop: MakeShop, url: str) -> None:
    """Small rows fill a batch by their number; behind them come large ones."""
    shop = make_shop(url, outbox_batch_size=5)
    flaky = shop.use_flaky_broker()
    write(shop, [10] * 5 + [4 * TENTH] * 7)
    first = shop.store.due(0, 5)
    behind = shop.store.due_behind(0, 5, first)

    assert [numbers_of(row.data) for row in behind] == [5, 6]
    assert shop.relay().run_once() == 12
    assert flaky.calls == [[0, 1, 2, 3, 4], [5, 6], [7, 8], [9, 10], [11]]


@pytest.mark.usefixtures("traced")
def test_no_more_is_fetched_from_the_database_than_fits(
    shop: OutboxShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows whose payloads are not sent now are not read either: 20 of 21 MB stay where they are."""
    monkeypatch.setattr(store, "BATCH_BYTES", 1_000_000)
    write(shop, [100_000] * 210)
    shop.store.due(0, 500)  # what is made once
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()

    rows = shop.store.due(0, 500)

    _, peak = tracemalloc.get_traced_memory()
    assert [row.id for row in rows] == [row["id"] for row in itertools.islice(shop.rows, 9)]
    assert peak - before < 5_000_000
