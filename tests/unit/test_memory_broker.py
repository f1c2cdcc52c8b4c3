"""The broker in memory on a virtual clock: taking messages, and what time does to them.

What it has in common with a real server is in ``tests/contract``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from flask_natspubsub.brokers.base import Delivery, StoredAck, StreamConfig
from flask_natspubsub.brokers.memory.broker import MemoryBroker
from flask_natspubsub.brokers.memory.clock import SystemClock, VirtualClock
from flask_natspubsub.errors import BrokerError, TopologyError
from flask_natspubsub.messages.message import Message

from .memory_helpers import STREAM, broker_on_a_virtual_clock, config, fetch, publish


@pytest.fixture
def broker() -> Iterator[MemoryBroker]:
    made = broker_on_a_virtual_clock()
    yield made
    made.close()


# --- clocks


def test_a_virtual_clock_stands_still_until_it_is_moved() -> None:
    clock = VirtualClock(100.0)

    clock.advance(2.5)

    assert clock.now() == 102.5
    with pytest.raises(ValueError, match="back"):
        clock.advance(-1)


def test_a_system_clock_never_goes_back() -> None:
    clock = SystemClock()
    readings = [clock.now() for _ in range(100)]

    assert readings == sorted(readings)
    assert VirtualClock().now() == pytest.approx(clock.now(), abs=60)


def test_only_a_virtual_clock_can_be_advanced() -> None:
    with pytest.raises(TypeError, match="VirtualClock"):
        MemoryBroker().advance(1)


# --- taking messages directly


def test_fetch_takes_what_can_be_delivered_and_never_waits(broker: MemoryBroker) -> None:
    assert fetch(broker) == []
    publish(broker, b"1", b"2", b"3")

    assert [d.data for d in fetch(broker, 2)] == [b"1", b"2"]
    assert [d.data for d in fetch(broker, 2)] == [b"3"]
    assert fetch(broker) == []


def test_fetch_from_a_consumer_that_does_not_exist_is_an_error(broker: MemoryBroker) -> None:
    with pytest.raises(TopologyError, match="nobody"):
        broker.fetch(STREAM, "nobody")
    with pytest.raises(TopologyError, match="elsewhere"):
        broker.fetch("elsewhere", "mailer")


def test_overlapping_filters_are_refused_as_a_server_does(broker: MemoryBroker) -> None:
    with pytest.raises(TopologyError, match=r"shop\.\*.*shop\.a"):
        broker.add_consumer(config("audit", filter_subjects=("shop.*", "shop.a")))


def test_wanted_streams_that_overlap_are_refused_as_a_server_does(broker: MemoryBroker) -> None:
    one = StreamConfig(name="one", subjects=("x.*.a",))
    two = StreamConfig(name="two", subjects=("x.b.>",))

    with pytest.raises(BrokerError, match="'one'"):
        broker.setup([one, two])


# --- virtual time


@pytest.mark.parametrize("ack_wait", [0.1, 1.0, 30.0, 3600.0])
def test_an_unsettled_message_is_due_exactly_after_ack_wait(
    broker: MemoryBroker, ack_wait: float
) -> None:
    broker.add_consumer(config(ack_wait=ack_wait))
    publish(broker, b"1")
    fetch(broker)

    broker.advance(ack_wait - 0.01)
    assert fetch(broker) == []
    broker.advance(0.01)

    assert [d.attempt for d in fetch(broker)] == [2]


@pytest.mark.parametrize("delay", [0.1, 1.0, 5.0, 29.0, 31.0, 3600.0])
def test_a_nak_with_a_delay_is_due_exactly_after_it(broker: MemoryBroker, delay: float) -> None:
    publish(broker, b"1")
    fetch(broker)[0].nak(delay)

    broker.advance(delay - 0.01)
    assert fetch(broker) == []
    broker.advance(0.01)

    assert [d.attempt for d in fetch(broker)] == [2]


def test_next_due_says_how_far_to_advance(broker: MemoryBroker) -> None:
    assert broker.next_due() is None
    publish(broker, b"1", b"2")
    assert broker.next_due() is None
    slow, quick = fetch(broker)
    assert broker.next_due() == pytest.approx(broker.now() + 30)
    slow.nak(7.3)
    quick.nak(0.7)

    for expected in (b"2", b"1"):
        due = broker.next_due(STREAM)
        assert due is not None
        broker.advance(due - broker.now())
        (delivery,) = fetch(broker)
        assert delivery.data == expected
        delivery.ack()

    assert broker.next_due() is None


def test_next_due_is_now_while_a_redelivery_waits_to_be_taken(broker: MemoryBroker) -> None:
    publish(broker, b"1")
    fetch(broker)[0].nak()

    assert broker.next_due() == broker.now()
    assert broker.next_due("elsewhere") is None


def test_in_progress_starts_ack_wait_anew(broker: MemoryBroker) -> None:
    publish(broker, b"1")
    (delivery,) = fetch(broker)

    for _ in range(5):
        broker.advance(20)
        delivery.in_progress()
    assert fetch(broker) == []
    broker.advance(30)

    assert [d.attempt for d in fetch(broker)] == [2]


def test_a_late_ack_settles_the_later_delivery_too(broker: MemoryBroker) -> None:
    publish(broker, b"1")
    (late,) = fetch(broker)
    broker.advance(31)
    assert len(fetch(broker)) == 1

    late.ack()
    broker.advance(100)

    assert fetch(broker) == []


def test_advancing_delivers_to_a_pull_without_any_thread(broker: MemoryBroker) -> None:
    threads = threading.active_count()
    received: list[Delivery] = []
    broker.consume(config(), received.append).request(10)
    publish(broker, b"1")
    received[0].nak(5.0)
    assert len(received) == 1

    broker.advance(5)

    assert [d.attempt for d in received] == [1, 2]
    assert threading.active_count() == threads


def test_messages_expire_and_are_not_redelivered() -> None:
    broker = broker_on_a_virtual_clock(max_age=60.0)
    publish(broker, b"1", b"2")
    assert len(fetch(broker, 1)) == 1

    broker.advance(60)

    assert fetch(broker) == []
    assert broker.next_due() is None
    info = broker.stream_info(STREAM)
    assert info is not None
    assert (info.messages, info.bytes, info.first_sequence) == (0, 0, 3)


def test_the_duplicate_window_moves_with_the_clock(broker: MemoryBroker) -> None:
    message = Message("shop.a", b"1", {"Nats-Msg-Id": "e1"})

    def submit() -> Any:
        return broker.submit([message], 1.0).results[0]

    submit()
    broker.advance(119.9)
    assert submit() == StoredAck(STREAM, 1, duplicate=True)
    broker.advance(0.1)
    assert submit() == StoredAck(STREAM, 2)


def test_a_limit_in_bytes_drops_the_oldest() -> None:
    broker = broker_on_a_virtual_clock(max_bytes=1000)

    publish(broker, *(b"x" * 300 for _ in range(10)))

    info = broker.stream_info(STREAM)
    assert info is not None
    assert info.messages == 2
    assert 600 < info.bytes <= 1000
