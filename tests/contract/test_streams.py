"""Looking after streams: setup, reports, reading and deleting messages."""

from __future__ import annotations

import pytest

from flask_natspubsub.brokers.base import Change, StreamConfig
from flask_natspubsub.errors import TopologyError
from tests.support.waiting import eventually

from .helpers import Place, ack


def actions(changes: list[Change]) -> list[tuple[str, str]]:
    return [(change.action, change.stream) for change in changes]


def test_setup_creates_what_is_missing_and_then_finds_nothing_to_do(empty_place: Place) -> None:
    place = empty_place
    dead_letters = StreamConfig(name=f"{place.stream}-dlq", subjects=(f"{place.env}.dlq.>",))
    wanted = [place.config(max_age=3600.0, max_msgs=1000), dead_letters]

    first = place.broker.setup(wanted)
    second = place.broker.setup(wanted)

    names = [place.stream, dead_letters.name]
    assert actions(first) == [("create", name) for name in names]
    assert actions(second) == [("ok", name) for name in names]
    assert place.info().config == wanted[0]


def test_a_dry_run_changes_nothing(empty_place: Place) -> None:
    place = empty_place

    changes = place.broker.setup([place.config()], dry_run=True)

    assert actions(changes) == [("create", place.stream)]
    assert place.broker.stream_info(place.stream) is None


def test_setup_adds_missing_subjects_and_keeps_the_rest(place: Place) -> None:
    place.publish(b"1")
    wanted = place.config(subjects=(f"{place.env}.shop.>", f"{place.env}.billing.>"))

    dry = place.broker.setup([wanted], dry_run=True)
    assert place.info().config.subjects == (f"{place.env}.shop.>",)
    changes = place.broker.setup([wanted])

    assert actions(changes) == actions(dry) == [("add_subjects", place.stream)]
    assert place.info().config.subjects == wanted.subjects
    assert place.info().messages == 1
    assert actions(place.broker.setup([place.config()])) == [("ok", place.stream)]
    assert place.info().config.subjects == wanted.subjects


def test_two_applications_share_the_stream(place: Place) -> None:
    other = place.config(subjects=(f"{place.env}.billing.>",))

    place.broker.setup([other])

    assert set(place.info().config.subjects) == {f"{place.env}.shop.>", f"{place.env}.billing.>"}


def test_another_stream_on_the_same_subjects_is_an_error_that_names_both(place: Place) -> None:
    wanted = StreamConfig(name=f"{place.env}-mine", subjects=(f"{place.env}.*.created",))

    for dry_run in (True, False):
        with pytest.raises(TopologyError) as caught:
            place.broker.setup([wanted], dry_run=dry_run)
        assert place.stream in str(caught.value)
        assert wanted.name in str(caught.value)
    assert place.broker.stream_info(wanted.name) is None


def test_what_differs_is_reported_and_left_alone(empty_place: Place) -> None:
    place = empty_place
    place.make_stream(storage="memory")

    changes = place.broker.setup([place.config(storage="file")])

    assert actions(changes) == [("differs", place.stream)]
    assert "storage" in changes[0].detail
    assert place.info().config.storage == "memory"


def test_a_report_on_a_stream_counts_its_messages(place: Place) -> None:
    assert place.info().messages == 0

    place.publish(b"1", b"2", b"3")
    place.broker.delete_message(place.stream, 1)

    info = place.info()
    assert (info.messages, info.first_sequence, info.last_sequence) == (2, 2, 3)
    assert info.bytes > 0
    assert info.created


def test_a_report_on_a_consumer_counts_what_it_has_to_do(place: Place) -> None:
    place.publish(b"1", b"2", b"3", b"4")
    place.publish(b"other", topic="user.created")
    inbox, consumption = place.consume(filters=(place.subject("order.*"),))
    info = place.consumer_info()
    assert (info.stream, info.durable) == (place.stream, "mailer")
    assert info.filter_subjects == (place.subject("order.*"),)
    assert (info.pending, info.ack_pending, info.redelivered) == (4, 0, 0)

    consumption.request(3)
    inbox.wait(3)[0].ack()
    eventually(lambda: place.consumer_info().ack_pending == 2)
    assert place.consumer_info().pending == 1

    inbox.received[1].nak()
    consumption.request(2)
    inbox.wait(5)

    assert sorted(delivery.attempt for delivery in inbox.received) == [1, 1, 1, 1, 2]
    info = place.consumer_info()
    assert (info.pending, info.ack_pending, info.redelivered) == (0, 3, 1)


def test_the_consumers_of_a_stream_are_listed_by_name(place: Place) -> None:
    place.publish(b"1", b"2")
    inbox, _ = place.consume("mailer", then=ack, credits=1)
    filters = (place.subject("user.*"), place.subject("order.paid"))
    place.consume("audit", filters=filters, metadata={"team": "books"})
    inbox.wait(1)
    eventually(lambda: place.consumer_info().ack_pending == 0)

    audit, mailer = place.broker.consumers(place.stream)

    assert (audit.durable, mailer.durable) == ("audit", "mailer")
    assert mailer == place.consumer_info("mailer")
    assert set(audit.filter_subjects) == set(filters)
    assert (mailer.delivered, mailer.ack_floor, mailer.pending) == (1, 1, 1)
    assert (audit.delivered, audit.last_active) == (0, "")
    assert mailer.last_active >= mailer.created > ""
    assert (audit.is_pull, audit.metadata["team"]) == (True, "books")


def test_a_stream_that_is_not_there_has_no_consumers(place: Place) -> None:
    assert place.broker.consumers(f"{place.env}-none") == []
    assert place.broker.consumers(place.stream) == []


def test_there_is_no_report_on_what_does_not_exist(place: Place) -> None:
    assert place.broker.stream_info(f"{place.env}-none") is None
    assert place.broker.consumer_info(place.stream, "none") is None
    assert place.broker.consumer_info(f"{place.env}-none", "none") is None
    assert place.broker.delete_consumer(place.stream, "none") is False


def test_a_deleted_consumer_is_gone_and_a_new_one_begins_anew(place: Place) -> None:
    place.publish(b"1")
    first, consumption = place.consume(then=ack, credits=1)
    first.wait(1)
    place.wait_until_settled()
    consumption.stop()

    assert place.broker.delete_consumer(place.stream, "mailer") is True
    assert place.broker.consumer_info(place.stream, "mailer") is None
    inbox, _ = place.consume(credits=1)

    assert inbox.wait(1)[0].attempt == 1


def test_a_message_can_be_read_without_consuming_it(place: Place) -> None:
    place.submit(place.message(b"\x00\xff", "order.paid", topic_name="naïve", Nats_Msg_Id="e1"))

    message = place.broker.get_message(place.stream, 1)

    assert message is not None
    assert (message.stream, message.sequence) == (place.stream, 1)
    assert message.subject == place.subject("order.paid")
    assert message.data == b"\x00\xff"
    assert dict(message.headers) == {"topic-name": "naïve", "Nats-Msg-Id": "e1"}
    assert message.timestamp == pytest.approx(place.broker.now(), abs=60)


def test_a_message_that_is_not_there_is_none(place: Place) -> None:
    assert place.broker.get_message(place.stream, 1) is None
    assert place.broker.get_message(f"{place.env}-none", 1) is None


def test_messages_are_read_oldest_first_by_subject_and_position(place: Place) -> None:
    for number in range(1, 41):
        place.publish(str(number).encode(), topic="order.paid" if number % 2 else "user.created")
    broker, stream = place.broker, place.stream

    everything = [message.sequence for message in broker.messages(stream)]
    odd = [m.sequence for m in broker.messages(stream, place.subject("order.*"))]
    late = [m.sequence for m in broker.messages(stream, place.subject("order.paid"), after=35)]

    assert everything == list(range(1, 41))
    assert odd == list(range(1, 41, 2))
    assert late == [37, 39]
    assert list(broker.messages(stream, place.subject("none"))) == []
    assert list(broker.messages(stream, after=40)) == []
    assert list(broker.messages(f"{place.env}-none")) == []


def test_messages_may_be_deleted_while_they_are_read(place: Place) -> None:
    place.publish(b"1", b"2", b"3")

    for message in place.broker.messages(place.stream):
        assert place.broker.delete_message(place.stream, message.sequence)

    assert place.info().messages == 0


def test_the_last_message_of_a_subject(place: Place) -> None:
    place.publish(b"1", b"2", topic="order.paid")
    place.publish(b"3", topic="order.created")

    last = place.broker.last_message(place.stream, place.subject("order.paid"))

    assert last is not None
    assert (last.sequence, last.data) == (2, b"2")
    assert place.broker.last_message(place.stream, place.subject("none")) is None
    assert place.broker.last_message(f"{place.env}-none", place.subject("order.paid")) is None


def test_the_last_message_is_the_one_before_when_it_is_deleted(place: Place) -> None:
    place.publish(b"1", b"2")

    place.broker.delete_message(place.stream, 2)

    last = place.broker.last_message(place.stream, place.subject("order.created"))
    assert last is not None
    assert last.sequence == 1


def test_a_message_is_deleted_once(place: Place) -> None:
    place.publish(b"1", b"2")

    assert place.broker.delete_message(place.stream, 1) is True
    assert place.broker.delete_message(place.stream, 1) is False
    assert place.broker.delete_message(place.stream, 99) is False
    assert place.broker.delete_message(f"{place.env}-none", 1) is False
    assert place.broker.get_message(place.stream, 1) is None
    assert place.publish(b"3")[0].sequence == 3


# --- whose a consumer is


def test_a_consumer_says_whose_it_is_and_is_refused_to_another(place: Place) -> None:
    mine = place.consumer("eu-new", app="shop", subscriber="eu-new")
    place.broker.add_consumer(mine)
    assert place.consumer_info("eu-new").metadata == {
        "natspubsub.app": "shop",
        "natspubsub.subscriber": "eu-new",
    }
    place.broker.add_consumer(mine)

    other = place.consumer("eu-new", app="shop-eu", subscriber="new")
    with pytest.raises(TopologyError, match=r"subscriber 'eu-new' of the app 'shop'.*'shop-eu'"):
        place.broker.add_consumer(other)
    with pytest.raises(TopologyError, match="another name="):
        place.broker.consume(other, lambda delivery: None)


def test_a_consumer_that_says_nothing_is_taken_over(place: Place) -> None:
    place.broker.add_consumer(place.consumer("mailer"))
    place.broker.add_consumer(place.consumer("mailer", app="shop", subscriber="mailer"))
    assert place.consumer_info("mailer").metadata["natspubsub.app"] == "shop"


def test_a_new_consumer_may_begin_behind_a_message(place: Place) -> None:
    place.publish(b"1", b"2", b"3")
    place.broker.add_consumer(place.consumer("late", start_after=2))
    assert place.consumer_info("late").pending == 1
