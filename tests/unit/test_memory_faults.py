"""The faults that a test can ask the broker in memory for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flask_natspubsub.brokers.base import Delivery, StoredAck
from flask_natspubsub.brokers.memory.broker import MemoryBroker
from flask_natspubsub.errors import NotConnected, PublishError

from .memory_helpers import STREAM, broker_on_a_virtual_clock, config, fetch, publish


@pytest.fixture
def broker() -> Iterator[MemoryBroker]:
    made = broker_on_a_virtual_clock()
    yield made
    made.close()


def test_failed_publishes_are_not_stored_and_have_an_unknown_outcome(
    broker: MemoryBroker,
) -> None:
    broker.fail_publishes(2)

    first, second, third = publish(broker, b"1", b"2", b"3")

    assert isinstance(first, PublishError)
    assert isinstance(second, PublishError)
    assert first.outcome == second.outcome == "unknown"
    assert third == StoredAck(STREAM, 1)


def test_a_dropped_ack_brings_the_message_back_after_ack_wait(broker: MemoryBroker) -> None:
    publish(broker, b"1", b"2")
    broker.drop_acks(1)

    for delivery in fetch(broker):
        delivery.ack()
        assert delivery.settled
    broker.advance(30)

    assert [(d.data, d.attempt) for d in fetch(broker)] == [(b"1", 2)]


def test_duplicate_brings_back_what_was_acked_and_nothing_else(broker: MemoryBroker) -> None:
    publish(broker, b"acked", b"given up", b"in hand", b"deleted", b"new")
    acked, given_up, _, deleted = fetch(broker, 4)
    acked.nak()
    fetch(broker, 1)[0].ack()
    given_up.term()
    deleted.ack()
    broker.delete_message(STREAM, deleted.sequence)

    broker.duplicate()

    assert [(d.data, d.attempt) for d in fetch(broker)] == [(b"acked", 3), (b"new", 1)]
    broker.duplicate()
    assert fetch(broker) == []


def test_duplicate_delivers_to_every_consumer_that_had_acked(broker: MemoryBroker) -> None:
    broker.add_consumer(config("audit"))
    publish(broker, b"1")
    for durable in ("mailer", "audit"):
        fetch(broker, durable=durable)[0].ack()

    broker.duplicate()

    for durable in ("mailer", "audit"):
        (again,) = fetch(broker, durable=durable)
        again.ack()
        assert again.attempt == 2
    assert broker.next_due() is None


def test_a_disconnected_broker_stores_and_delivers_nothing(broker: MemoryBroker) -> None:
    received: list[Delivery] = []
    pull = broker.consume(config(), received.append)
    publish(broker, b"1")

    broker.disconnect()
    pull.request(10)
    (error,) = publish(broker, b"2")

    assert not broker.is_connected
    assert not pull.is_healthy
    assert isinstance(error, NotConnected)
    assert error.outcome == "not_sent"
    assert received == []
    assert fetch(broker) == []
    for call in (
        lambda: broker.connect(1.0),
        lambda: broker.stream_info(STREAM),
        lambda: broker.setup([]),
        lambda: list(broker.messages(STREAM)),
        lambda: broker.delete_consumer(STREAM, "mailer"),
    ):
        with pytest.raises(NotConnected):
            call()


def test_after_reconnect_pulls_go_on(broker: MemoryBroker) -> None:
    received: list[Delivery] = []
    pull = broker.consume(config(), received.append)
    broker.disconnect()
    pull.request(2)
    broker.send("shop.a", b"lost")

    broker.reconnect()
    publish(broker, b"1", b"2", b"3")

    assert [d.data for d in received] == [b"1", b"2"]
    assert pull.is_healthy


def test_settlements_while_disconnected_are_lost(broker: MemoryBroker) -> None:
    publish(broker, b"1", b"2", b"3", b"4")
    deliveries = fetch(broker)
    broker.advance(20)

    broker.disconnect()
    deliveries[0].ack()
    deliveries[1].nak()
    deliveries[2].term()
    deliveries[3].in_progress()
    broker.reconnect()

    assert fetch(broker) == []
    broker.advance(10)
    assert [d.attempt for d in fetch(broker)] == [2, 2, 2, 2]


def test_what_was_on_its_way_when_the_connection_broke_stays_requested(
    broker: MemoryBroker,
) -> None:
    received: list[Delivery] = []

    def break_off(delivery: Delivery) -> None:
        received.append(delivery)
        if len(received) == 1:
            broker.disconnect()

    broker.consume(config(), break_off).request(3)
    publish(broker, b"1", b"2", b"3")
    assert [d.data for d in received] == [b"1"]

    broker.reconnect()
    broker.advance(30)

    assert [(d.data, d.attempt) for d in received[1:]] == [(b"1", 2), (b"2", 2)]


def test_a_closed_broker_stays_closed(broker: MemoryBroker) -> None:
    received: list[Delivery] = []
    pull = broker.consume(config(), received.append)
    pull.request(1)

    broker.close()
    broker.reconnect()

    assert not broker.is_connected
    assert isinstance(publish(broker, b"1")[0], NotConnected)
    assert received == []
    pull.stop()
