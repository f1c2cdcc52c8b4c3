"""Tests of users that work in one transaction, and roll it back at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_natspubsub.testing import TestBroker

from .conftest import MakeShop
from .shop import OutboxShop, begin_transactions


@contextmanager
def connections_for_engines(shop: OutboxShop) -> Iterator[None]:
    """Do as Flask-SQLAlchemy's maintainer advises."""
    with shop.app.app_context():
        engines = shop.db.engines
    with ExitStack() as stack:
        for key, engine in list(engines.items()):
            connection = stack.enter_context(engine.connect())
            stack.callback(engines.__setitem__, key, engine)
            stack.callback(connection.begin().rollback)
            engines[key] = connection
        yield


@contextmanager
def session_on_a_connection(shop: OutboxShop) -> Iterator[None]:
    """Do as SQLAlchemy's docs advise: sessions are bound to the connection, engines stay."""
    with shop.engine.connect() as connection:
        transaction = connection.begin()
        before = shop.db.session
        maker = orm.sessionmaker(connection, join_transaction_mode="create_savepoint")
        shop.db.session = orm.scoped_session(maker)
        yield
        shop.db.session.remove()
        shop.db.session = before
        transaction.rollback()


@pytest.fixture
def mended(make_shop: MakeShop, url: str, request: pytest.FixtureRequest) -> Iterator[OutboxShop]:
    """A shop in a transaction that is rolled back, after which nothing is there."""
    shop = make_shop(url, use_inbox=True, backoff=[1])
    begin_transactions(shop.engine)
    with request.param(shop):
        yield shop
    assert (shop.orders, shop.rows) == ([], [])
    assert shop.execute("SELECT count(*) FROM natspubsub_inbox")[0][0] == 0
    assert shop.execute("SELECT count(*) FROM natspubsub_lease")[0][0] == 0


BOTH = pytest.mark.parametrize(
    "mended", [connections_for_engines, session_on_a_connection], indirect=True
)


def names(shop: OutboxShop) -> list[str]:
    with shop.app.app_context():
        return list(shop.session.scalars(sa.select(shop.Order.name).order_by(shop.Order.id)))


@BOTH
def test_publish_drain_and_handle(mended: OutboxShop) -> None:
    shop = mended

    @shop.app.post("/orders")
    def create() -> dict[str, str]:
        shop.session.add(shop.Order(name="order"))
        shop.publish(1)
        shop.publish(2, event_id="two")
        shop.session.commit()
        return {}

    @shop.pubsub.subscriber("order.created", name="booking")
    def booking(message: dict[str, Any]) -> None:
        shop.session.add(shop.Order(name=f"booked {message['n']}"))
        if message["n"] == 2:
            with shop.session.begin():
                shop.publish(3, topic="order.booked")

    with TestBroker(shop.app) as broker:
        assert shop.app.test_client().post("/orders").status_code == 200
        broker.assert_published("order.created", n=1)
        broker.drain()
        broker.duplicate()
        broker.drain()
        assert broker.dead_letters == []
        assert [one.result for one in broker.outcomes] == ["handled"] * 2 + ["skipped"] * 2
        broker.assert_published("order.booked", n=3)
    assert names(shop) == ["order", "booked 1", "booked 2"]


@BOTH
def test_what_a_failing_handler_did_is_undone(mended: OutboxShop) -> None:
    shop = mended
    attempts: list[int] = []

    @shop.pubsub.subscriber("order.created", name="booking")
    def booking(message: dict[str, Any]) -> None:
        attempts.append(message["n"])
        shop.session.add(shop.Order(name=f"booked {len(attempts)}"))
        shop.session.flush()
        if len(attempts) == 1:
            raise RuntimeError
        if len(attempts) == 2:
            shop.session.rollback()
            shop.session.add(shop.Order(name="again"))

    with TestBroker(shop.app) as broker:
        with shop.app.app_context():
            shop.session.add(shop.Order(name="of the test"))
            shop.publish(1)
            shop.session.commit()
        broker.drain()
        assert [one.result for one in broker.outcomes] == ["retried", "handled"]
    assert names(shop) == ["of the test", "again"]


@BOTH
def test_in_the_context_of_the_test(mended: OutboxShop) -> None:
    shop, handled = mended, []

    @shop.pubsub.subscriber("order.created", name="booking")
    def booking(message: dict[str, Any]) -> None:
        handled.append(message["n"])

    with shop.app.app_context(), TestBroker(shop.app) as broker:
        shop.session.add(shop.Order(name="a"))
        shop.publish(1)
        shop.session.commit()
        broker.drain()
        shop.publish(2)
        shop.session.commit()
        broker.drain()
        assert len(broker.published) == 2
    assert handled == [1, 2]
