"""The costs of outbox and inbox, in statements, which a busy machine does not change."""

from __future__ import annotations

from itertools import count

import pytest

from tests.support.waiting import eventually, for_seconds

from .shop import OutboxShop


@pytest.mark.parametrize("events", [1, 10])
def test_outbox_costs_a_request_one_statement(shop: OutboxShop, events: int) -> None:
    """One for all rows; on SQLite, where a statement is no round trip, one for each row."""
    numbers = count()

    def request() -> str:
        shop.session.add(shop.Order(name=f"order {next(numbers)}"))
        shop.publish(*range(events))
        shop.session.commit()
        return "ok"

    shop.app.add_url_rule("/", "order", request)
    client = shop.app.test_client()
    assert client.get("/").status_code == 200
    with shop.counting() as statements:
        assert client.get("/").status_code == 200
    inserts = [one for one in statements if "natspubsub_outbox" in one]
    assert 1 <= len(inserts) <= (1 if shop.engine.name == "postgresql" else events), inserts[:2]
    assert len(statements) == len(inserts) + 1, "and the order"


def test_inbox_costs_a_message_one_statement(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    handled: list[int] = []

    @shop.pubsub.subscriber("order.created", name="mailer", inbox=True)
    def handle(message: dict[str, int]) -> None:
        handled.append(message["n"])

    with shop.app.app_context():
        shop.publish(0, outbox=False)
        with shop.pubsub.run_worker(relay=False):
            eventually(lambda: len(handled) == 1, 30)
            with shop.counting() as statements:
                shop.publish(*range(1, 21), outbox=False)
                eventually(lambda: len(handled) == 21, 30)
    assert len(statements) <= 20, statements[:3]
    assert all("natspubsub_inbox" in one for one in statements)


def test_idle_relay_asks_the_database_as_often_as_it_is_told(sqlite_shop: OutboxShop) -> None:
    """An idle relay reads once an interval, and the lease and other partitions now and then."""
    shop = sqlite_shop
    shop.start_relay()
    eventually(lambda: shop.execute("SELECT owner FROM natspubsub_lease"), 30)
    with shop.counting() as statements:
        for_seconds(3.2, lambda: None)
        looks = [one for one in statements if "natspubsub_outbox" in one]
    others = [one for one in looks if one.startswith("SELECT natspubsub_outbox.partition")]
    assert 1 <= len(looks) - len(others) <= 5
    assert len(others) <= 2
    assert len(statements) <= 8
