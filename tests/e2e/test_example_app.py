"""The shop, tested as its author would: no server, no worker process, no sleeping."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select

from example_app import create_app
from example_app.extensions import db
from example_app.models import AuditEntry, Order, Product, Reservation
from flask_natspubsub.cli import natspubsub

TEAPOT, CUP, SAMOVAR = 1, 2, 3


@pytest.fixture
def _push_request_context():
    """Stand in for pytest-flask's fixture of this name, if that is installed.

    It keeps one context open around each test, in which all requests would share one
    database session and not see what handlers have committed.
    """


@pytest.fixture
def app(tmp_path):
    app = create_app(
        {
            "TESTING": True,
            "SQLALCHEMY_DATABASE_URI": f"sqlite:///{tmp_path / 'shop.db'}",
            "NATSPUBSUB_PRESET": "testing",
        }
    )
    app.test_cli_runner().invoke(args=["init-db"], catch_exceptions=False)
    yield app
    with app.app_context():
        db.engine.dispose()


@pytest.fixture
def shop(app):
    return app.test_client()


def order(shop, product_id=TEAPOT, quantity=2, **headers):
    body = {"product_id": product_id, "quantity": quantity}
    return shop.post("/orders", json=body, headers=headers)


def stock(shop, product_id):
    return next(p["stock"] for p in shop.get("/products").json if p["id"] == product_id)


def topics(shop, order_id):
    return [entry["topic"] for entry in shop.get(f"/orders/{order_id}").json["history"]]


# --- the way of an order


def test_an_order_is_confirmed_and_leaves_a_trail(shop, pubsub_broker):
    answer = order(shop)

    assert answer.status_code == 202
    assert answer.json["state"] == "pending"
    assert answer.location == "/orders/1"
    pubsub_broker.assert_published("order.created", order_id=1, product_id=TEAPOT, quantity=2)

    pubsub_broker.drain()

    pubsub_broker.assert_published("order.confirmed", order_id=1)
    assert shop.get("/orders/1").json["state"] == "confirmed"
    assert topics(shop, 1) == ["order.created", "order.confirmed"]
    assert stock(shop, TEAPOT) == 998
    assert pubsub_broker.dead_letters == []


def test_an_order_for_more_than_there_is_is_rejected(shop, pubsub_broker):
    order(shop, CUP, 9)
    pubsub_broker.drain()

    pubsub_broker.assert_not_published("order.confirmed")
    assert shop.get("/orders/1").json["state"] == "rejected"
    assert topics(shop, 1) == ["order.created", "order.rejected"]
    assert stock(shop, CUP) == 8


def test_the_stock_is_sold_to_the_last_piece_and_no_further(shop, pubsub_broker):
    for _ in range(5):
        order(shop, CUP, 3)
    pubsub_broker.drain()

    states = [found["state"] for found in shop.get("/orders").json]
    assert sorted(states) == ["confirmed"] * 2 + ["rejected"] * 3
    assert stock(shop, CUP) == 2


def test_everything_about_an_order_has_the_trace_id_of_its_request(shop, pubsub_broker):
    answer = order(shop, **{"X-Trace-ID": "customer-7"})
    pubsub_broker.drain()

    found = shop.get("/orders/1").json
    assert answer.headers["X-Trace-ID"] == answer.json["trace_id"] == "customer-7"
    assert {entry["trace_id"] for entry in found["history"]} == {"customer-7"}


# --- faults


def test_messages_that_come_twice_change_nothing(app, shop, pubsub_broker):
    order(shop)
    pubsub_broker.drain()
    created = {"order_id": 1, "product_id": TEAPOT, "quantity": 2}
    pubsub_broker.deliver("order.created", created, event_id="order-1-created")
    pubsub_broker.deliver("order.confirmed", {"order_id": 1}, event_id="order-1-confirmed")
    pubsub_broker.drain()

    assert stock(shop, TEAPOT) == 998
    assert topics(shop, 1) == ["order.created", "order.confirmed"]
    with app.app_context():
        assert db.session.scalar(select(func.count(Reservation.order_id))) == 1
    assert pubsub_broker.dead_letters == []


def test_a_settled_order_stays_settled(shop, pubsub_broker):
    order(shop)
    pubsub_broker.drain()
    pubsub_broker.deliver("order.rejected", {"order_id": 1}, event_id="order-1-rejected")
    pubsub_broker.drain()

    assert shop.get("/orders/1").json["state"] == "confirmed"


def test_an_order_nobody_can_handle_ends_as_a_dead_letter_and_can_be_replayed(
    app, shop, pubsub_broker
):
    order(shop, SAMOVAR, 1)
    pubsub_broker.drain()

    assert len(pubsub_broker.dead_letters) == 1
    assert shop.get("/orders/1").json["state"] == "pending"

    assert shop.patch(f"/products/{SAMOVAR}", json={"warehouse": "south"}).status_code == 200
    replay = ["dlq", "replay", "--subscriber", "reserve_stock"]
    result = app.test_cli_runner().invoke(natspubsub, replay)
    assert result.exit_code == 0, result.output
    pubsub_broker.drain()

    assert shop.get("/orders/1").json["state"] == "confirmed"
    assert topics(shop, 1) == ["order.created", "order.confirmed"]


def test_an_order_that_could_not_be_announced_is_kept_and_announced_on_repetition(
    shop, pubsub_broker
):
    pubsub_broker.fail_publishes(1)
    failed = order(shop, **{"Idempotency-Key": "cart-1"})

    assert failed.status_code == 503
    assert failed.json["error"]["code"] == "not_published"
    assert failed.json["trace_id"] == failed.headers["X-Trace-ID"]
    assert failed.headers["Retry-After"] == "1"

    repeated = order(shop, **{"Idempotency-Key": "cart-1"})
    pubsub_broker.drain()

    assert repeated.status_code == 202
    assert [found["state"] for found in shop.get("/orders").json] == ["confirmed"]
    assert stock(shop, TEAPOT) == 998


def test_orders_that_were_never_announced_can_be_announced_later(app, shop, pubsub_broker):
    pubsub_broker.fail_publishes(1)
    order(shop)

    result = app.test_cli_runner().invoke(args=["republish-pending"])
    pubsub_broker.drain()

    assert result.output == "Announced again: 1\n"
    assert shop.get("/orders/1").json["state"] == "confirmed"


# --- the HTTP interface


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, {"product_id": "is missing", "quantity": "is missing"}),
        (
            {"product_id": 1, "quantity": 0},
            {"quantity": "must be a whole number from 1 to 10000"},
        ),
        (
            {"product_id": 1, "quantity": True},
            {"quantity": "must be a whole number from 1 to 10000"},
        ),
        ({"product_id": 99, "quantity": 1}, {"product_id": "there is no such product"}),
        ({"product_id": 1, "quantity": 1, "gift": 1}, {"gift": "is not a known field"}),
        ([], {"body": "must be a JSON object, sent as application/json"}),
    ],
)
def test_a_bad_order_is_refused_with_the_reason_for_each_field(shop, pubsub_broker, body, fields):
    answer = shop.post("/orders", json=body)

    assert answer.status_code == 400
    assert answer.json["error"]["code"] == "invalid_input"
    assert answer.json["error"]["fields"] == fields
    assert answer.json["trace_id"] == answer.headers["X-Trace-ID"]
    pubsub_broker.assert_not_published("order.created")
    assert shop.get("/orders").json == []


@pytest.mark.parametrize(
    ("method", "path", "data", "status"),
    [
        ("POST", "/orders", "{", 400),
        ("GET", "/orders/7", None, 404),
        ("GET", "/nowhere", None, 404),
        ("DELETE", "/orders", None, 405),
        ("GET", "/orders?state=lost", None, 400),
    ],
)
def test_every_error_is_json_with_the_trace_id(shop, method, path, data, status):
    answer = shop.open(path, method=method, data=data, content_type="application/json")

    assert answer.status_code == status
    assert answer.json["error"]["message"]
    assert answer.json["trace_id"] == answer.headers["X-Trace-ID"]


def test_an_idempotency_key_makes_one_order_of_many_requests(shop, pubsub_broker):
    answers = [order(shop, **{"Idempotency-Key": "cart-1"}) for _ in range(3)]
    pubsub_broker.drain()

    assert [answer.json["id"] for answer in answers] == [1, 1, 1]
    assert stock(shop, TEAPOT) == 998
    assert order(shop, quantity=5, **{"Idempotency-Key": "cart-1"}).status_code == 409


def test_orders_are_listed_by_state(shop, pubsub_broker):
    order(shop)
    order(shop, CUP, 9)
    pubsub_broker.drain()
    order(shop)

    by_state = {
        state: [found["id"] for found in shop.get(f"/orders?state={state}").json]
        for state in ("confirmed", "rejected", "pending")
    }
    assert by_state == {"confirmed": [1], "rejected": [2], "pending": [3]}


def test_the_page_shows_orders_with_state_and_trail(shop, pubsub_broker):
    assert "None yet" in shop.get("/").text
    order(shop)
    pubsub_broker.drain()

    page = shop.get("/").text
    assert '<span class="state confirmed">confirmed</span>' in page
    assert "order.created</code>" in page


# --- several at once, on one SQLite file


def test_handlers_at_once_never_sell_more_than_there_is(app):
    from example_app.events import OrderCreated
    from example_app.subscribers import decide

    with app.app_context():
        db.session.add_all(Order(id=i, product_id=CUP, quantity=1) for i in range(1, 41))
        db.session.commit()

    def decide_on(order_id):
        with app.app_context():
            return decide(OrderCreated(order_id=order_id, product_id=CUP, quantity=1)).accepted

    with ThreadPoolExecutor(8) as threads:
        decisions = list(threads.map(decide_on, range(1, 41)))

    assert sum(decisions) == 8
    with app.app_context():
        assert db.session.get(Product, CUP).stock == 0
        assert db.session.scalar(select(func.count(AuditEntry.id))) == 0
