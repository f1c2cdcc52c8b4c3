"""The shop, tested as its author would: no server, no worker process, no sleeping."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select, text

from example_app import create_app
from example_app.extensions import db
from example_app.extensions import pubsub as shop_pubsub
from example_app.models import Order, Product, StockMovement
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


def test_rollback_takes_what_a_savepoint_did(app):
    with app.app_context():
        before = db.session.get(Product, TEAPOT).stock
        db.session.rollback()
        with db.session.begin_nested():
            db.session.get(Product, TEAPOT).stock = before + 1
            shop_pubsub.publish("stock.counted", {})
        db.session.rollback()
        assert db.session.get(Product, TEAPOT).stock == before
        counted = text("SELECT count(*) FROM natspubsub_outbox WHERE subject LIKE '%counted'")
        assert db.session.scalar(counted) == 0


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
    before = pubsub_broker.published
    pubsub_broker.duplicate()
    pubsub_broker.drain()

    assert [outcome.result for outcome in pubsub_broker.outcomes].count("skipped") == 4
    assert pubsub_broker.published == before
    assert stock(shop, TEAPOT) == 998
    assert topics(shop, 1) == ["order.created", "order.confirmed"]
    assert pubsub_broker.dead_letters == []


def test_a_worker_that_dies_after_the_commit_does_not_sell_twice(shop, pubsub_broker):
    order(shop)
    pubsub_broker.drop_acks(4)
    pubsub_broker.drain()

    assert stock(shop, TEAPOT) == 998
    assert shop.get("/orders/1").json["state"] == "confirmed"


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


def test_orders_are_accepted_while_nats_is_down(shop, pubsub_broker):
    pubsub_broker.disconnect()
    assert order(shop).status_code == 202
    pubsub_broker.drain()
    assert shop.get("/orders/1").json["state"] == "pending"

    pubsub_broker.reconnect()
    pubsub_broker.drain()

    assert shop.get("/orders/1").json["state"] == "confirmed"


def test_an_order_that_is_not_committed_has_no_events(app, shop, pubsub_broker, monkeypatch):
    def fail(self):
        raise RuntimeError("the database is full")

    published = len(pubsub_broker.published)
    with monkeypatch.context() as patch:
        patch.setattr("sqlalchemy.orm.Session.commit", fail)
        app.config["PROPAGATE_EXCEPTIONS"] = False
        assert order(shop).status_code == 500

    assert len(pubsub_broker.published) == published
    assert shop.get("/orders").json == []


def test_the_movement_of_an_order_is_told_in_each_of_its_states(app, shop, pubsub_broker):
    order(shop, CUP, 8)
    order(shop, CUP, 1)
    pubsub_broker.drain()

    told = [found.message for found in pubsub_broker.published_to("stock.movement")]
    assert sorted((one["order_id"], one["state"]) for one in told) == [
        (1, "booked"),
        (1, "planned"),
        (2, "planned"),
        (2, "refused"),
    ]
    with app.app_context():
        assert db.session.get_one(StockMovement, 1).state == "booked"


def test_whoever_changes_a_product_tells_the_others(shop, pubsub_broker, caplog):
    shop.patch(f"/products/{SAMOVAR}", json={"stock": 2})
    pubsub_broker.drain()

    pubsub_broker.assert_published("product.created", name="Samovar")
    pubsub_broker.assert_published("product.updated", stock=2, changed=["stock"])
    assert "only 2 left: Samovar" in caplog.text


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


def test_handlers_at_once_never_sell_more_than_there_is(app, shop):
    for _ in range(40):
        assert order(shop, CUP, 1).status_code == 202

    with app.app_context(), shop_pubsub.run_worker(concurrency=8) as worker:
        worker.wait_until_idle()

    with app.app_context():
        shop_pubsub.shutdown(app)
        states = select(Order.state, func.count()).group_by(Order.state)
        assert dict(db.session.execute(states).all()) == {
            "confirmed": 8,
            "rejected": 32,
        }
        assert db.session.get(Product, CUP).stock == 0
