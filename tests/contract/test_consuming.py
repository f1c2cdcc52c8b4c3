"""Who gets which messages: filters, durables, sharing, credit, starting points."""

from __future__ import annotations

import itertools
import threading

import pytest

from flask_natspubsub.errors import TopologyError
from flask_natspubsub.messages.headers import Headers
from flask_natspubsub.messages.message import Message
from tests.support.waiting import eventually

from .helpers import Inbox, Place, ack


def test_a_delivery_is_the_message_as_it_was_published(place: Place) -> None:
    headers = {"topic": "order.created", "X-Größe": "naïve: yes", "x-empty": ""}
    message = place.message(b'{"a":1}')
    place.submit(type(message)(message.subject, message.data, headers))

    inbox, _ = place.consume(credits=1)

    (delivery,) = inbox.wait(1)
    assert delivery.subject == place.subject("order.created")
    assert delivery.data == b'{"a":1}'
    assert dict(delivery.headers) == headers
    assert list(delivery.headers) == list(headers)
    assert (delivery.stream, delivery.sequence) == (place.stream, 1)
    assert delivery.attempt == 1
    assert not delivery.settled
    assert delivery.timestamp == pytest.approx(place.broker.now(), abs=60)


@pytest.mark.parametrize(
    "payload", [b"", bytes(range(256)), b"\r\n\r\nMSG x 1 5\r\n", b"x" * 1024 * 1024]
)
def test_any_bytes_are_a_payload(place: Place, payload: bytes) -> None:
    place.publish(payload)
    inbox, _ = place.consume(credits=1)

    assert inbox.wait(1)[0].data == payload


def test_messages_come_in_the_order_of_the_stream(place: Place) -> None:
    payloads = [str(n).encode() for n in range(200)]
    inbox, _ = place.consume(then=ack, credits=500)

    place.publish(*payloads)

    inbox.wait(200)
    assert inbox.payloads == payloads


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["order.created"], [b"order.created"]),
        (["order.*"], [b"order.created", b"order.paid"]),
        (["order.>"], [b"order.created", b"order.paid", b"order.line.added"]),
        (["*.created"], [b"order.created", b"user.created"]),
        (["order.paid", "user.>"], [b"order.paid", b"user.created"]),
    ],
)
def test_a_consumer_gets_what_its_filters_select(
    place: Place, filters: list[str], expected: list[bytes]
) -> None:
    for topic in ("order.created", "order.paid", "order.line.added", "user.created"):
        place.publish(topic.encode(), topic=topic)

    inbox, _ = place.consume(
        filters=tuple(place.subject(topic) for topic in filters), then=ack, credits=10
    )

    inbox.wait(len(expected))
    place.wait_until_settled()
    assert inbox.payloads == expected


def test_a_filter_may_reach_beyond_the_stream(empty_place: Place) -> None:
    place = empty_place
    place.make_stream(subjects=(f"{place.env}.events.>", f"{place.env}.shop.>"))
    place.publish(b"1")

    inbox, _ = place.consume(filters=(f"{place.env}.*.order.created",), credits=1)

    assert inbox.wait(1)[0].data == b"1"


def test_each_durable_gets_every_message(place: Place) -> None:
    mailer, _ = place.consume("mailer", then=ack, credits=10)
    audit, _ = place.consume("audit", then=ack, credits=10)

    place.publish(b"1", b"2", b"3")

    mailer.wait(3)
    audit.wait(3)
    assert mailer.payloads == audit.payloads == [b"1", b"2", b"3"]


def test_two_pulls_on_one_durable_share_its_messages(place: Place) -> None:
    one, _ = place.consume(then=ack, credits=100)
    other, _ = place.consume(then=ack, credits=100)
    eventually(lambda: place.consumer_info().waiting >= 2)

    place.publish(*(str(n).encode() for n in range(60)))

    eventually(lambda: len(one.received) + len(other.received) >= 60)
    place.wait_until_settled()
    assert sorted(map(int, one.payloads + other.payloads)) == list(range(60))
    assert one.received
    assert other.received


def test_nothing_arrives_that_was_not_requested(place: Place) -> None:
    place.publish(b"1", b"2", b"3", b"4", b"5")
    inbox, consumption = place.consume()

    consumption.request(2)
    inbox.wait(2)
    info = place.consumer_info()
    assert (info.ack_pending, info.pending) == (2, 3)

    consumption.request(1)
    inbox.wait(3)
    info = place.consumer_info()
    assert (info.ack_pending, info.pending) == (3, 2)


def test_an_ack_is_no_request(place: Place) -> None:
    place.publish(b"1", b"2")
    inbox, _ = place.consume(then=ack, credits=1)

    inbox.wait(1)
    eventually(lambda: place.consumer_info().ack_pending == 0)

    assert place.consumer_info().pending == 1
    assert len(inbox.received) == 1


def test_requests_add_up_while_there_is_nothing_to_deliver(place: Place) -> None:
    inbox, consumption = place.consume(then=ack)
    for _ in range(3):
        consumption.request(1)

    for payload in (b"1", b"2", b"3", b"4"):
        place.publish(payload)

    inbox.wait(3)
    eventually(lambda: place.consumer_info().ack_pending == 0)
    assert place.consumer_info().pending == 1


def test_no_more_than_max_ack_pending_are_unsettled(place: Place) -> None:
    place.publish(b"1", b"2", b"3", b"4")
    inbox, _ = place.consume(max_ack_pending=2, credits=10)

    inbox.wait(2)
    assert place.consumer_info().ack_pending == 2
    inbox.received[0].ack()
    inbox.wait(3)

    assert inbox.payloads == [b"1", b"2", b"3"]


def test_a_stopped_pull_gets_nothing_and_keeps_nothing_from_others(place: Place) -> None:
    stopped, consumption = place.consume(credits=100)
    eventually(lambda: place.consumer_info().waiting >= 1)
    consumption.stop()
    consumption.stop()
    consumption.request(5)

    place.publish(b"1", b"2", b"3")
    inbox, _ = place.consume(then=ack, credits=3)

    inbox.wait(3)
    assert sorted(inbox.payloads) == [b"1", b"2", b"3"]
    assert stopped.received == []


def test_what_is_on_its_way_to_a_pull_that_stops_goes_to_others(place: Place) -> None:
    total = 400
    first, consumption = place.consume(credits=total, ack_wait=60.0)
    enough = threading.Event()
    first.then = lambda _: enough.set() if len(first.received) >= 20 else None

    ticket = place.broker.submit([place.message(str(n).encode()) for n in range(total)], 10.0)
    assert enough.wait(10)
    consumption.stop()
    held = list(first.received)
    for delivery in held:
        delivery.ack()
    second, _ = place.consume(then=ack, credits=2 * total, ack_wait=60.0)

    assert ticket.wait(10)
    place.wait_until_settled()
    assert {*first.payloads, *second.payloads} == {str(n).encode() for n in range(total)}
    assert first.received == held


def test_what_was_delivered_before_the_stop_can_be_settled_after_it(place: Place) -> None:
    place.publish(b"1")
    inbox, consumption = place.consume(credits=1)
    (delivery,) = inbox.wait(1)

    consumption.stop()
    delivery.ack()

    place.wait_until_settled()


def test_a_pull_can_be_stopped_while_it_is_handed_a_message(place: Place) -> None:
    place.publish(b"1")
    inbox = Inbox()
    consumption = place.broker.consume(place.consumer(), inbox)
    inbox.then = lambda delivery: threading.Thread(target=delivery.ack).start()

    consumption.request(1)
    inbox.wait(1)
    consumption.stop()

    place.wait_until_settled()


def test_a_durable_goes_on_where_it_was(place: Place) -> None:
    place.publish(b"1", b"2")
    first, consumption = place.consume(then=ack, credits=10)
    first.wait(2)
    place.wait_until_settled()
    consumption.stop()
    place.publish(b"3", b"4")

    second, _ = place.consume(then=ack, credits=10)

    second.wait(2)
    assert second.payloads == [b"3", b"4"]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("all", [b"1", b"2", b"other", b"3"]),
        ("new", [b"3"]),
        ("last", [b"other", b"3"]),
    ],
)
def test_the_deliver_policy_says_where_a_new_consumer_begins(
    place: Place, policy: str, expected: list[bytes]
) -> None:
    place.publish(b"1", b"2")
    place.publish(b"other", topic="user.created")

    inbox, _ = place.consume(deliver_policy=policy, then=ack, credits=10)
    place.publish(b"3")

    inbox.wait(len(expected))
    place.wait_until_settled()
    assert inbox.payloads == expected


def test_last_is_the_last_message_that_the_filter_selects(place: Place) -> None:
    place.publish(b"1", b"2")
    place.publish(b"other", topic="user.created")

    inbox, _ = place.consume(
        deliver_policy="last", filters=(place.subject("order.*"),), then=ack, credits=10
    )

    inbox.wait(1)
    place.wait_until_settled()
    assert inbox.payloads == [b"2"]


def test_last_of_an_empty_stream_is_the_first_to_come(place: Place) -> None:
    inbox, _ = place.consume(deliver_policy="last", then=ack, credits=10)

    place.publish(b"1", b"2")

    inbox.wait(2)


def test_the_deliver_policy_of_an_existing_consumer_does_not_matter(place: Place) -> None:
    place.publish(b"1")
    first, consumption = place.consume(deliver_policy="all", then=ack, credits=10)
    first.wait(1)
    place.wait_until_settled()
    consumption.stop()
    place.publish(b"2")

    second, _ = place.consume(deliver_policy="new", then=ack, credits=10)

    second.wait(1)
    assert second.payloads == [b"2"]


def test_new_filters_update_the_consumer_in_place(place: Place) -> None:
    place.publish(b"1", topic="order.created")
    first, consumption = place.consume(filters=(place.subject("order.*"),), then=ack, credits=10)
    first.wait(1)
    place.wait_until_settled()
    consumption.stop()

    filters = (place.subject("order.*"), place.subject("user.*"))
    second, _ = place.consume(filters=filters, then=ack, credits=10)
    place.publish(b"2", topic="user.created")

    second.wait(1)
    assert second.payloads == [b"2"]
    assert set(place.consumer_info().filter_subjects) == set(filters)


def test_two_versions_share_a_consumer_and_each_gets_its_own(place: Place) -> None:
    orders, users = place.subject("order.*"), place.subject("user.*")
    new, _ = place.consume(filters=(orders, users), then=ack, credits=50)
    old, consumption = place.consume(filters=(orders,), then=ack, credits=50)
    assert set(place.consumer_info().filter_subjects) == {orders, users}

    place.publish(*(str(n).encode() for n in range(6)), topic="order.created")
    place.publish(*(str(n).encode() for n in range(6, 12)), topic="user.created")

    eventually(lambda: {*new.payloads} >= {str(n).encode() for n in range(6, 12)}, 30)
    place.wait_until_settled()
    assert {delivery.subject for delivery in old.received} <= {place.subject("order.created")}
    assert len(new.received) + len(old.received) == 12
    consumption.stop()
    place.publish(b"12", topic="user.created")
    new.wait_for(b"12")


def test_a_subject_that_the_stream_does_not_store_is_found_elsewhere(place: Place) -> None:
    foreign = f"{place.env}-orders"
    place.broker.setup([place.config(name=foreign, subjects=(f"{foreign}.>",))])
    config = place.consumer(filters=(f"{foreign}.new",), elsewhere="there")

    placed = place.broker.place(config)
    inbox = Inbox(ack)
    consumption = place.broker.consume(config, inbox)
    consumption.request(5)
    place.submit(Message(f"{foreign}.new", b"1", {}))

    assert (placed.stream, placed.durable) == (foreign, "there")
    assert consumption.consumer == (foreign, "there")
    inbox.wait(1)
    assert place.broker.consumer_info(foreign, "there") is not None
    assert place.broker.consumer_info(place.stream, "mailer") is None
    own = place.consumer(elsewhere="there")
    assert place.broker.place(own) == own


def test_a_header_sent_twice_arrives_with_both_values(place: Place) -> None:
    inbox, _ = place.consume(then=ack, credits=5)
    headers = Headers([("Accept", "a"), ("Accept", "b"), ("Other", "c")])

    place.submit(Message(place.subject("order.created"), b"1", headers))

    (delivery,) = inbox.wait(1)
    assert Headers(delivery.headers).getlist("Accept") == ["a", "b"]
    assert delivery.headers["Accept"] == "a"
    stored = place.broker.get_message(place.stream, 1)
    assert stored is not None
    assert Headers(stored.headers).getlist("Accept") == ["a", "b"]


def test_a_missing_stream_is_a_topology_error_that_names_it(empty_place: Place) -> None:
    with pytest.raises(TopologyError, match=empty_place.stream):
        empty_place.broker.consume(empty_place.consumer(), Inbox())


def test_a_filter_the_stream_does_not_store_is_a_topology_error(place: Place) -> None:
    config = place.consumer(filters=(place.subject("a"), f"{place.env}.billing.>"))

    with pytest.raises(TopologyError, match=rf"{place.env}\.billing\.>"):
        place.broker.consume(config, Inbox())

    assert place.broker.consumer_info(place.stream, "mailer") is None


def test_a_running_pull_is_healthy(place: Place) -> None:
    _, consumption = place.consume(credits=1)

    eventually(lambda: consumption.is_healthy)


def test_a_pull_outlives_its_consumer(place: Place) -> None:
    inbox, _ = place.consume(then=ack, credits=100)

    for payload in (b"1", b"2", b"3"):
        assert place.broker.delete_consumer(place.stream, "mailer")
        place.publish(payload)

        inbox.wait_for(payload)


def test_pulls_of_many_durables_work_side_by_side(place: Place) -> None:
    inboxes = [place.consume(f"s{n}", then=ack, credits=50)[0] for n in range(10)]

    place.publish(*(str(n).encode() for n in range(30)))

    for inbox in inboxes:
        inbox.wait(30)
    numbers = list(itertools.chain.from_iterable(map(int, inbox.payloads) for inbox in inboxes))
    assert sorted(numbers) == sorted(list(range(30)) * 10)
