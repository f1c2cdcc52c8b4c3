"""A bookshop and its tests, as somebody who uses the extension would write them.

Everything down to the line is the user's project; below it are the tests, with the fixture
``pubsub_broker`` of the pytest plugin.
"""

from __future__ import annotations

import unittest
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Blueprint, Flask, current_app, request

from flask_natspubsub import (
    DeadLetter,
    Discard,
    NatsPubsub,
    NotConnected,
    PublishError,
    Retry,
    Subscriber,
    SubscriberGroup,
)
from flask_natspubsub.testing import TestBroker

pubsub = NatsPubsub()
views = Blueprint("shop", __name__)


@dataclass
class BookOrdered:
    order_id: int
    isbn: str
    email: str


class MailServer:
    """Sends mail, when it is there."""

    def __init__(self) -> None:
        self.sent: dict[str, str] = {}
        self.is_away = False

    def send(self, key: str, to: str) -> None:
        if self.is_away:
            raise ConnectionError("the mail server is away")
        if to.endswith("@example.invalid"):
            raise ValueError("no such address")
        self.sent[key] = to


@views.post("/orders")
def order() -> tuple[dict[str, Any], int]:
    body = request.get_json()
    if not body.get("isbn"):
        return {"error": "which book?"}, 400
    event = BookOrdered(body["order_id"], body["isbn"], body.get("email", "a@example.org"))
    try:
        receipt = pubsub.publish("order.created", event, event_id=f"order-{event.order_id}")
    except PublishError:
        return {"error": "try again later"}, 503
    return {"event": receipt.event_id}, 202


@pubsub.subscriber("order.created", max_deliver=4, backoff=[1, 60, 3600])
def send_confirmation(message: BookOrdered, context: Any) -> None:
    current_app.extensions["mail"].send(context.event_id, message.email)
    pubsub.publish("order.confirmed", {"order_id": message.order_id})


class Stock(Subscriber, pubsub=pubsub):
    """Counts the books; each order once, however often it is delivered."""

    topics = "order.created"

    def __init__(self) -> None:
        self.left = {"111": 2}
        self.seen: set[str] = set()

    def handle(self, message: BookOrdered, context: Any) -> None:
        if context.event_id in self.seen:
            raise Discard("counted already")
        if message.isbn not in self.left:
            raise DeadLetter(f"unknown book {message.isbn}")
        if not self.left[message.isbn]:
            raise Retry(delay=24 * 3600, reason="sold out, new ones come every night")
        self.seen.add(context.event_id)
        self.left[message.isbn] -= 1
        current_app.config["STOCK"] = dict(self.left)


payments = SubscriberGroup("payments", prefix="payment", producer="bank")


@payments.subscriber("received")
async def note_payment(message: dict[str, Any], context: Any) -> None:
    current_app.config.setdefault("PAID", []).append(message["order_id"])


pubsub.register_group(payments)


def create_app() -> Flask:
    app = Flask("bookshop")
    app.config["NATSPUBSUB_URLS"] = "nats://nats.example.org:4222"
    app.extensions["mail"] = MailServer()
    app.register_blueprint(views)
    pubsub.init_app(app)
    return app


# -------------------------------------------------------------------------------------------


@pytest.fixture
def app():
    return create_app()


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def mail(app):
    return app.extensions["mail"]


ORDER = {"order_id": 1, "isbn": "111", "email": "zoe@example.org"}


def test_an_order_is_announced(client, pubsub_broker):
    response = client.post("/orders", json=ORDER)

    assert response.status_code == 202
    event = pubsub_broker.assert_published("order.created", order_id=1, isbn="111")
    assert event.event_id == response.json["event"] == "order-1"
    assert event.envelope["message_type"] == "BookOrdered"


def test_a_bad_order_is_not_announced(client, pubsub_broker):
    assert client.post("/orders", json={"order_id": 1}).status_code == 400
    assert pubsub_broker.published == []
    pubsub_broker.assert_not_published("order.created")


def test_the_customer_gets_a_mail(client, mail, pubsub_broker):
    client.post("/orders", json=ORDER)
    assert mail.sent == {}

    pubsub_broker.drain()
    assert mail.sent == {"order-1": "zoe@example.org"}
    pubsub_broker.assert_published("order.confirmed", order_id=1)
    assert pubsub_broker.dead_letters == []


def test_an_order_placed_twice_is_one_event(client, pubsub_broker):
    for _ in range(2):
        assert client.post("/orders", json=ORDER).status_code == 202
    assert len(pubsub_broker.published_to("order.created")) == 1


def test_the_mail_is_sent_once_the_mail_server_is_back(client, mail, pubsub_broker, monkeypatch):
    attempts = []

    def away_until_the_third(key, to):
        attempts.append(key)
        if len(attempts) < 3:
            raise ConnectionError("away")

    monkeypatch.setattr(mail, "send", away_until_the_third)
    client.post("/orders", json=ORDER)
    pubsub_broker.drain()  # an hour and more of retries, at once

    assert attempts == ["order-1"] * 3
    assert len(pubsub_broker.published_to("order.confirmed")) == 1


def test_a_mail_that_cannot_be_sent_is_kept_for_somebody_to_look_at(client, mail, pubsub_broker):
    mail.is_away = True
    client.post("/orders", json=ORDER)
    pubsub_broker.drain()
    (letter,) = pubsub_broker.dead_letters

    assert letter.subscriber == "send_confirmation"
    assert letter.error == "ConnectionError: the mail server is away"
    assert letter.deliveries == 4

    mail.is_away = False
    pubsub.dead_letters.replay(letter)
    pubsub_broker.drain()
    assert mail.sent == {"order-1": "zoe@example.org"}
    assert pubsub_broker.dead_letters == []


@pytest.mark.parametrize("fault", ["duplicate", "lost ack"])
def test_books_are_counted_once_however_often_an_order_is_delivered(
    app, client, pubsub_broker, fault
):
    if fault == "lost ack":
        pubsub_broker.drop_acks(2)
    client.post("/orders", json=ORDER)
    pubsub_broker.drain()
    if fault == "duplicate":
        pubsub_broker.duplicate()
        pubsub_broker.drain()

    assert app.config["STOCK"] == {"111": 1}
    assert [outcome.result for outcome in pubsub_broker.outcomes].count("discarded") == 1


def test_an_unknown_book_is_given_up_at_once(client, pubsub_broker):
    client.post("/orders", json={**ORDER, "isbn": "222"})
    pubsub_broker.drain()
    (letter,) = pubsub_broker.dead_letters
    assert (letter.subscriber, letter.reason, letter.deliveries) == ("stock", "rejected", 1)


def test_a_book_that_is_sold_out_is_tried_again_every_night(client, pubsub_broker):
    for number in range(3):
        client.post("/orders", json={**ORDER, "order_id": number})
    pubsub_broker.drain()

    (letter,) = pubsub_broker.dead_letters
    assert (letter.event_id, letter.deliveries) == ("order-2", 5)
    retried = [one for one in pubsub_broker.outcomes if one.result == "retried"]
    assert {one.event_id for one in retried} == {"order-2"}
    assert all("again in 8.64e+04 s" in one.detail for one in retried)


def test_a_request_is_traced_through_all_that_follows(client, pubsub_broker):
    client.post("/orders", json=ORDER, headers={"X-Trace-ID": "trace-1"})
    pubsub_broker.drain()

    created = pubsub_broker.assert_published("order.created")
    confirmed = pubsub_broker.assert_published("order.confirmed")
    assert created.trace_id == confirmed.trace_id == "trace-1"
    assert confirmed.envelope["causation_id"] == created.event_id


def test_an_event_of_another_application(app, pubsub_broker):
    handled = pubsub_broker.deliver("payment.received", {"order_id": 7}, producer="bank")
    assert handled == 1
    assert app.config["PAID"] == [7]

    # The group listens to the bank only.
    assert pubsub_broker.deliver("payment.received", {"order_id": 8}) == 0
    assert app.config["PAID"] == [7]


def test_nonsense_from_elsewhere_does_no_harm(mail, pubsub_broker):
    pubsub_broker.deliver("order.created", b"<order/>")
    pubsub_broker.deliver("order.created", {"order_id": "one"})

    reasons = [letter.reason for letter in pubsub_broker.dead_letters]
    assert sorted(reasons) == ["malformed", "malformed", "schema", "schema"]
    assert mail.sent == {}


def test_the_shop_says_so_when_it_cannot_take_orders(client, pubsub_broker):
    pubsub_broker.disconnect()
    assert client.post("/orders", json=ORDER).status_code == 503
    with pytest.raises(NotConnected):
        pubsub.publish("order.created", {})

    pubsub_broker.reconnect()
    assert client.post("/orders", json=ORDER).status_code == 202


def test_an_order_that_may_or_may_not_have_arrived_can_be_sent_again(client, pubsub_broker):
    pubsub_broker.fail_publishes(1)
    assert client.post("/orders", json=ORDER).status_code == 503
    assert client.post("/orders", json=ORDER).status_code == 202
    assert len(pubsub_broker.published) == 1


def test_what_was_published_is_named_when_an_assertion_fails(client, pubsub_broker):
    client.post("/orders", json=ORDER)
    with pytest.raises(AssertionError, match=r"published topics: order\.created"):
        pubsub_broker.assert_published("order.shipped")
    with pytest.raises(AssertionError, match="'isbn': '111'"):
        pubsub_broker.assert_published("order.created", isbn="333")


def test_handlers_can_be_called_like_any_function(app, mail):
    """A subscriber is still the function that was written."""
    with TestBroker(app) as broker, app.app_context():
        send_confirmation(BookOrdered(5, "111", "a@example.org"), SimpleNamespace(event_id="x"))
        broker.assert_published("order.confirmed", order_id=5)
    assert mail.sent == {"x": "a@example.org"}


class TestWithUnittest(unittest.TestCase):
    """The broker is no pytest affair."""

    def setUp(self) -> None:
        self.app_under_test = create_app()
        self.broker = TestBroker(self.app_under_test)
        self.addCleanup(self.broker.close)

    def test_an_order_is_confirmed(self) -> None:
        self.app_under_test.test_client().post("/orders", json=ORDER)
        self.broker.drain()
        event = self.broker.assert_published("order.confirmed")
        self.assertEqual(event.message, {"order_id": 1})  # noqa: PT009 - that is the point
