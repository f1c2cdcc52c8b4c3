"""How deliveries end: ack, nak, term, in-progress, or not at all."""

from __future__ import annotations

import time

import pytest

from tests.support.waiting import eventually, for_seconds

from .helpers import Inbox, Place, ack


def test_an_acked_message_never_comes_again(place: Place) -> None:
    place.publish(b"1")
    first, consumption = place.consume(then=ack, credits=1, ack_wait=1.0)
    first.wait(1)
    place.wait_until_settled()
    consumption.stop()

    inbox, _ = place.consume(credits=10, ack_wait=1.0)
    place.publish(b"2")

    assert inbox.wait(1)[0].data == b"2"


def test_a_nak_brings_the_message_back_at_once(place: Place) -> None:
    place.publish(b"1")
    inbox, _ = place.consume(credits=10, ack_wait=60.0)

    inbox.wait(1)[0].nak()
    first, second = inbox.wait(2)
    second.nak()
    third = inbox.wait(3)[2]
    third.ack()

    assert [d.attempt for d in inbox.received] == [1, 2, 3]
    assert {(d.sequence, d.data) for d in inbox.received} == {(1, b"1")}
    assert first.settled
    assert third.settled
    place.wait_until_settled()


def test_a_redelivery_needs_credit_too(place: Place) -> None:
    place.publish(b"1")
    inbox, consumption = place.consume(credits=1)

    inbox.wait(1)[0].nak()
    eventually(lambda: place.consumer_info().ack_pending == 1)
    assert len(inbox.received) == 1
    consumption.request(1)

    assert inbox.wait(2)[1].attempt == 2


def test_a_nak_with_a_delay_brings_it_back_after_the_delay(place: Place) -> None:
    place.publish(b"1", b"2")
    inbox, _ = place.consume(credits=10, ack_wait=60.0)
    first, second = inbox.wait(2)

    started = time.monotonic()
    first.nak(1.0)
    second.nak()
    assert inbox.wait(3)[2].data == b"2"
    inbox.received[2].ack()
    again = inbox.wait(4)[3]

    assert time.monotonic() - started >= 0.95
    assert (again.data, again.attempt) == (b"1", 2)


def test_a_delay_longer_than_ack_wait_is_kept(place: Place) -> None:
    place.publish(b"1")
    inbox, _ = place.consume(credits=10, ack_wait=0.5)

    started = time.monotonic()
    inbox.wait(1)[0].nak(1.5)
    again = inbox.wait(2)[1]
    again.ack()

    assert time.monotonic() - started >= 1.45
    assert again.attempt == 2


def test_a_terminated_message_never_comes_again(place: Place) -> None:
    place.publish(b"1", b"2")
    inbox, _ = place.consume(credits=10, ack_wait=1.0)

    first, second = inbox.wait(2)
    first.term("given up")
    second.ack()

    place.wait_until_settled()
    assert len(inbox.received) == 2
    assert place.broker.get_message(place.stream, 1) is not None


def test_a_message_that_nobody_settles_comes_again_and_is_counted(place: Place) -> None:
    place.publish(b"1")
    inbox, _ = place.consume(credits=10, ack_wait=1.0)

    started = time.monotonic()
    last = inbox.wait(3)[2]
    last.ack()

    assert time.monotonic() - started >= 1.9
    assert [d.attempt for d in inbox.received] == [1, 2, 3]
    place.wait_until_settled()


def test_redeliveries_are_counted_for_each_consumer(place: Place) -> None:
    place.publish(b"1")
    mailer, _ = place.consume("mailer", credits=10)
    mailer.wait(1)[0].nak()
    mailer.wait(2)[1].ack()

    audit, _ = place.consume("audit", credits=10)

    assert audit.wait(1)[0].attempt == 1
    assert [d.attempt for d in mailer.received] == [1, 2]


def test_in_progress_holds_off_the_redelivery(place: Place) -> None:
    place.publish(b"1")
    inbox, _ = place.consume(credits=10, ack_wait=1.0)
    (delivery,) = inbox.wait(1)

    for_seconds(2.5, delivery.in_progress, interval=0.2)
    assert len(inbox.received) == 1

    inbox.wait(2)[1].ack()
    place.wait_until_settled()


def test_only_the_first_settlement_counts(place: Place) -> None:
    place.publish(b"1", b"2")
    inbox, _ = place.consume(credits=10, ack_wait=60.0)
    first, second = inbox.wait(2)

    first.ack()
    first.nak()
    first.term()
    second.nak()
    second.ack()

    again = inbox.wait(3)[2]
    assert (again.data, again.attempt) == (b"2", 2)
    again.ack()
    place.wait_until_settled()


def test_in_progress_after_the_settlement_does_nothing(place: Place) -> None:
    place.publish(b"1")
    inbox, _ = place.consume(credits=10, ack_wait=60.0)
    (delivery,) = inbox.wait(1)

    delivery.ack()
    delivery.in_progress()

    place.wait_until_settled()


@pytest.mark.parametrize("verb", ["ack", "nak", "term"])
def test_a_delivery_knows_that_it_is_settled(place: Place, verb: str) -> None:
    place.publish(b"1")
    inbox, _ = place.consume(credits=1)
    (delivery,) = inbox.wait(1)

    delivery.in_progress()
    assert not delivery.settled
    getattr(delivery, verb)()
    assert delivery.settled


def test_a_shorter_ack_wait_counts_for_what_is_already_delivered(place: Place) -> None:
    place.publish(b"1", b"2")
    first, consumption = place.consume(credits=2, ack_wait=60.0)
    first.wait(2)[0].ack()
    eventually(lambda: place.consumer_info().ack_pending == 1)
    consumption.stop()

    inbox, _ = place.consume(credits=10, ack_wait=1.0)

    (again,) = inbox.wait(1)
    again.ack()
    assert (again.data, again.attempt) == (b"2", 2)
    place.wait_until_settled()


def test_what_a_vanished_pull_had_in_hand_goes_to_another(place: Place) -> None:
    place.publish(b"1")
    first, consumption = place.consume(credits=1, ack_wait=1.0)
    first.wait(1)
    consumption.stop()

    other, _ = place.consume(credits=1, ack_wait=1.0)

    assert other.wait(1)[0].attempt == 2


def test_a_deleted_message_is_not_delivered_again(place: Place) -> None:
    place.publish(b"1", b"2")
    inbox, _ = place.consume(credits=10, ack_wait=1.0)
    first, second = inbox.wait(2)
    place.broker.delete_message(place.stream, 1)

    first.nak()
    second.nak()
    again = inbox.wait(3)[2]
    again.ack()

    assert again.data == b"2"
    place.wait_until_settled()


def test_a_callback_may_settle_request_and_publish(place: Place) -> None:
    inbox = Inbox()
    consumption = place.broker.consume(place.consumer(), inbox)

    def chain(delivery: object) -> None:
        inbox.received[-1].ack()
        consumption.request(1)
        if len(inbox.received) < 5:
            place.broker.submit([place.message(b"next")], 5.0)

    inbox.then = chain
    consumption.request(1)
    place.publish(b"first")

    inbox.wait(5)
    place.wait_until_settled()


def test_a_callback_that_fails_does_not_stop_the_pull(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = Inbox()

    def fail_once(delivery: object) -> None:
        if len(inbox.received) == 1:
            raise ValueError("a bug in the callback")
        inbox.received[-1].ack()

    inbox.then = fail_once
    consumption = place.broker.consume(place.consumer(ack_wait=1.0), inbox)
    consumption.request(10)

    place.publish(b"1", b"2")

    inbox.wait(3)
    assert sorted(inbox.payloads) == [b"1", b"1", b"2"]
    assert "a bug in the callback" in caplog.text
