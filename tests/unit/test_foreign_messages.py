"""Messages of other systems: without an envelope, on other streams."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from flask import Flask

from flask_natspubsub import NatsPubsub, RegistrationError, Retry, Subscriber
from flask_natspubsub.subscribing.durables import orphans
from flask_natspubsub.testing import TestBroker


@dataclass
class Order:
    id: int
    total: str = "0"


class Site:
    """An app with one subscriber to what others write."""

    def __init__(self) -> None:
        self.app = Flask("shop")
        self.app.config["NATSPUBSUB_PRESET"] = "testing"
        self.pubsub = NatsPubsub(self.app)
        self.calls: list[tuple[Any, Any]] = []
        self.broker = TestBroker(self.app)

    def subscribe(self, handler: Callable[..., Any] | None = None, **options: Any) -> None:
        def record(message, context):  # type: ignore[no-untyped-def]
            self.calls.append((message, context))

        given = {"subject": "orders.>", "name": "foreign", **options}
        self.pubsub.subscriber(**given)(handler or record)

    @property
    def messages(self) -> list[Any]:
        return [message for message, _ in self.calls]

    @property
    def reasons(self) -> list[str]:
        return [letter.reason for letter in self.broker.dead_letters]


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    with made.broker:
        yield made


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"id": 1}', {"id": 1}),
        (b'{"message": {"id": 1}}', {"message": {"id": 1}}),
        (b"[1, 2]", [1, 2]),
        (b'"text"', "text"),
        (b"null", None),
        (b"12.5", 12.5),
        (b"", b""),
        (b"\xff\x00", b"\xff\x00"),
        (b"{broken", b"{broken"),
    ],
)
def test_without_an_envelope_the_message_is_what_was_sent(
    site: Site, data: bytes, message: Any
) -> None:
    site.subscribe(envelope=False)
    site.broker.deliver_raw("orders.new", data)
    assert site.messages == [message]
    assert site.reasons == []


def test_the_context_has_what_the_headers_say(site: Site) -> None:
    site.subscribe(envelope=False)
    headers = {"Nats-Msg-Id": "o-1", "trace_id": "t-1"}
    site.broker.deliver_raw("orders.eu.new", {"id": 1}, headers=headers)
    ((_, context),) = site.calls
    assert (context.event_id, context.topic, context.trace_id) == ("o-1", "orders.eu.new", "t-1")
    assert (context.producer, dict(context.envelope)) == (None, {})
    assert context.raw == b'{"id":1}'
    assert context.occurred_at == context.published_at


def test_a_raw_subject_takes_both_unless_it_is_told(site: Site) -> None:
    site.subscribe()
    site.broker.deliver_raw("orders.new", {"id": 1})
    site.broker.deliver_raw("orders.new", {"event_id": "e", "topic": "a.b", "message": {"id": 2}})
    assert site.messages == [{"id": 1}, {"id": 2}]
    assert [context.topic for _, context in site.calls] == ["orders.new", "a.b"]


@pytest.mark.parametrize("options", [{"envelope": True}, {"subject": "test.shop.orders.>"}])
def test_where_an_envelope_is_meant_its_lack_is_an_error(
    site: Site, options: dict[str, Any]
) -> None:
    site.subscribe(**options)
    prefix = options.get("subject", "orders.>").removesuffix(">")
    site.broker.deliver_raw(f"{prefix}new", {"id": 1})
    assert site.messages == []
    assert site.reasons == ["malformed"]


def test_annotations_work_as_ever(site: Site) -> None:
    got: list[Any] = []

    def typed(message: Order) -> None:
        got.append(message)

    site.subscribe(typed, envelope=False)
    site.broker.deliver_raw("orders.new", {"id": 1, "total": "9.90"})
    site.broker.deliver_raw("orders.new", {"id": "one"})
    site.broker.deliver_raw("orders.new", b"no JSON")
    assert got == [Order(1, "9.90")]
    assert site.reasons == ["schema", "malformed"]


def test_a_handler_that_asks_for_bytes_gets_bytes(site: Site) -> None:
    got: list[bytes] = []

    def raw(message: bytes) -> None:
        got.append(message)

    site.subscribe(raw, envelope=False)
    site.broker.deliver_raw("orders.new", b'{"id": 1}')
    assert got == [b'{"id": 1}']


def test_a_handler_that_asks_for_a_list_gets_one(site: Site) -> None:
    got: list[list[int]] = []

    def numbers(message: list[int]) -> None:
        got.append(message)

    site.subscribe(numbers, envelope=False)
    site.broker.deliver_raw("orders.new", b"[1, 2]")
    site.broker.deliver_raw("orders.new", b'["one"]')
    assert got == [[1, 2]]
    assert site.reasons == ["schema"]


def test_a_function_decodes(site: Site) -> None:
    def read(data: bytes, headers: Any) -> list[list[str]]:
        return list(csv.reader(data.decode(headers["Charset"]).splitlines()))

    site.subscribe(envelope=read)
    site.broker.deliver_raw("orders.csv", "1,ü".encode("latin-1"), headers={"Charset": "latin-1"})
    site.broker.deliver_raw("orders.csv", b"\xff", headers={"Charset": "utf-8"})
    assert site.messages == [[["1", "ü"]]]
    (letter,) = site.broker.dead_letters
    assert letter.reason == "malformed"
    assert "UnicodeDecodeError" in letter.error
    assert letter.data == b"\xff"


def test_a_function_of_the_bytes_alone_and_one_that_asks_for_a_retry(site: Site) -> None:
    attempts: list[bytes] = []

    def read(data: bytes) -> str:
        attempts.append(data)
        if len(attempts) == 1:
            raise Retry(5, "the registry of schemas is down")
        return data.decode()

    site.subscribe(envelope=read)
    site.broker.deliver_raw("orders.new", b"text")
    assert site.messages == ["text"]
    assert site.reasons == []


def test_what_fails_is_a_dead_letter_that_keeps_bytes_and_headers(site: Site) -> None:
    def fail(message: Any) -> None:
        raise ValueError("no")

    site.subscribe(fail, envelope=False, max_deliver=2)
    from flask_natspubsub.messages.headers import Headers

    twice = Headers([("Accept", "a"), ("Accept", "b"), ("Nats-Msg-Id", "o-1")])
    site.broker.deliver_raw("orders.new", b"\x00", headers=twice)
    (letter,) = site.broker.dead_letters
    assert (letter.data, letter.event_id, letter.deliveries) == (b"\x00", "o-1", 2)
    assert letter.original_subject == "orders.new"
    assert Headers(letter.headers).getlist("Accept") == ["a", "b"]
    with site.app.app_context():
        site.pubsub.dead_letters.replay(letter)
    site.broker.drain()
    (again,) = site.broker.dead_letters
    assert Headers(again.headers).getlist("Accept") == ["a", "b"]


def test_a_stream_of_its_own_and_its_consumer_for_each_environment(site: Site) -> None:
    site.subscribe(stream="ORDERS", envelope=False)
    site.broker.deliver_raw("orders.new", {"id": 1})
    ((_, context),) = site.calls
    assert context.stream == "ORDERS"
    (subscription,) = site.app.extensions["natspubsub"].subscriptions()
    assert subscription.durable == "test-shop-foreign"


def test_the_stream_of_the_app_may_be_named(site: Site) -> None:
    @site.pubsub.subscriber("order.created", stream="test-events-stream")
    def own(message: Any) -> None:
        site.calls.append((message, None))

    site.broker.deliver("order.created", {"id": 1})
    assert site.messages == [{"id": 1}]
    (subscription,) = site.app.extensions["natspubsub"].subscriptions()
    assert subscription.durable == "shop-own"


def test_a_class_has_the_options_too(site: Site) -> None:
    got: list[Any] = []

    class Foreign(Subscriber, pubsub=site.pubsub):
        subject = "orders.>"
        stream = "ORDERS"
        envelope = False

        def handle(self, message: Any) -> None:
            got.append(message)

    site.broker.deliver_raw("orders.new", [1])
    assert got == [[1]]


@pytest.mark.parametrize("bad", [{"stream": "a.b"}, {"stream": 5}, {"envelope": "no"}])
def test_bad_options_are_refused_where_they_are_written(site: Site, bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(RegistrationError, match=f"{name} is "):
        site.subscribe(**bad)


def test_other_streams_add_no_subjects_to_the_own_one(site: Site) -> None:
    @site.pubsub.subscriber("bill.paid", producer="billing", stream="BILLING")
    def paid(message: Any) -> None:
        """Never called."""

    (main, _) = site.app.extensions["natspubsub"].streams()
    assert "test.billing.>" not in main.subjects


def test_consumers_without_a_subscriber_are_found(site: Site) -> None:
    def keep(message: Any) -> None:
        """Do nothing."""

    site.pubsub.subscriber("order.created", name="kept")(keep)
    state = site.app.extensions["natspubsub"]
    site.broker.drain()
    other = NatsPubsub(Flask("other"))
    other.subscriber("order.created", name="gone", producer="shop")(keep)
    broker = state.broker()
    for durable in ("shop-gone", "shopping-gone", "other-gone"):
        config = state.subscriptions()[0].consumer_config(state.settings.stream)
        broker.add_consumer(type(config)(
            stream=config.stream, durable=durable, filter_subjects=config.filter_subjects
        ))  # fmt: skip
    found = orphans(broker, state.settings, state.subscriptions())
    assert [info.durable for info in found] == ["shop-gone"]
