"""In which threads, and in which order, the broker in memory calls back."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from flask_natspubsub.brokers.base import Delivery
from flask_natspubsub.brokers.memory.broker import MemoryBroker
from flask_natspubsub.messages.message import Message
from tests.support.waiting import eventually

from .memory_helpers import STREAM, broker_on_a_virtual_clock, config, fetch, publish, stream_config


@pytest.fixture
def broker() -> Iterator[MemoryBroker]:
    made = broker_on_a_virtual_clock()
    yield made
    made.close()


@pytest.fixture
def real_time() -> Iterator[MemoryBroker]:
    made = MemoryBroker()
    made.setup([stream_config()])
    yield made
    made.close()


def timer_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "natspubsub-memory-broker"]


def test_there_is_a_timer_thread_only_while_a_redelivery_waits(real_time: MemoryBroker) -> None:
    received: list[Delivery] = []
    pull = real_time.consume(config(ack_wait=0.2), received.append)
    pull.request(10)
    assert timer_threads() == []

    publish(real_time, b"1")
    assert len(timer_threads()) == 1
    eventually(lambda: len(received) == 2)
    received[1].ack()

    eventually(lambda: timer_threads() == [])


def test_a_nak_hastens_the_timer(real_time: MemoryBroker) -> None:
    received: list[Delivery] = []
    real_time.consume(config(ack_wait=60.0), received.append).request(10)
    publish(real_time, b"1")

    received[0].nak(0.1)

    eventually(lambda: len(received) == 2)
    assert received[1].attempt == 2


def test_closing_ends_the_timer_thread(real_time: MemoryBroker) -> None:
    real_time.consume(config(ack_wait=60.0), lambda _: None).request(10)
    publish(real_time, b"1")
    assert len(timer_threads()) == 1

    real_time.close()

    assert timer_threads() == []


def test_callbacks_run_one_at_a_time_and_in_order(real_time: MemoryBroker) -> None:
    inside = 0
    most = 0
    sequences: list[int] = []

    def receive(delivery: Delivery) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        sequences.append(delivery.sequence)
        delivery.ack()
        inside -= 1

    real_time.consume(config(), receive).request(1000)
    threads = [threading.Thread(target=publish, args=(real_time, *[b"x"] * 100)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    eventually(lambda: len(sequences) == 500)
    assert sequences == sorted(sequences)
    assert most == 1


def test_a_chain_of_callbacks_does_not_nest(broker: MemoryBroker) -> None:
    received: list[Delivery] = []
    pull = broker.consume(config(), lambda delivery: react(delivery))

    def react(delivery: Delivery) -> None:
        received.append(delivery)
        delivery.ack()
        pull.request(1)
        if len(received) < 5000:
            publish(broker, b"next")

    pull.request(1)
    publish(broker, b"first")

    assert len(received) == 5000


def test_stop_waits_for_the_message_that_is_being_handed_over(real_time: MemoryBroker) -> None:
    entered, leave = threading.Event(), threading.Event()
    events: list[str] = []

    def receive(delivery: Delivery) -> None:
        entered.set()
        leave.wait(10)
        events.append("received")

    pull = real_time.consume(config(), receive)
    pull.request(2)
    publisher = threading.Thread(target=publish, args=(real_time, b"1", b"2"))
    publisher.start()
    assert entered.wait(10)

    def stop() -> None:
        pull.stop(10)
        events.append("stopped")

    stopper = threading.Thread(target=stop)
    stopper.start()
    eventually(lambda: pull.is_stopped)
    leave.set()
    stopper.join(10)
    publisher.join(10)

    assert events == ["received", "stopped"]
    real_time.add_consumer(config())
    (handed_back,) = real_time.fetch(STREAM, "mailer")
    assert (handed_back.data, handed_back.attempt) == (b"2", 2)


def test_stop_gives_up_waiting_after_its_timeout(real_time: MemoryBroker) -> None:
    entered, leave = threading.Event(), threading.Event()

    def receive(delivery: Delivery) -> None:
        entered.set()
        leave.wait(10)

    pull = real_time.consume(config(), receive)
    pull.request(1)
    publisher = threading.Thread(target=publish, args=(real_time, b"1"))
    publisher.start()
    assert entered.wait(10)

    pull.stop(0.05)

    assert publisher.is_alive()
    leave.set()
    publisher.join(10)


def test_a_pull_may_stop_itself_in_its_callback(broker: MemoryBroker) -> None:
    received: list[Delivery] = []

    def receive(delivery: Delivery) -> None:
        received.append(delivery)
        pull.stop()

    pull = broker.consume(config(), receive)
    pull.request(10)
    publish(broker, b"1", b"2")

    assert [d.data for d in received] == [b"1"]
    assert [d.data for d in fetch(broker)] == [b"2"]


def test_a_listener_that_stopped_gets_nothing_of_what_was_queued(broker: MemoryBroker) -> None:
    received: list[Message] = []

    def receive(message: Message) -> None:
        received.append(message)
        listener.stop()

    listener = broker.listen("shop.>", receive)
    publish(broker, b"1", b"2")

    assert [message.data for message in received] == [b"1"]


def test_an_interrupt_in_a_callback_does_not_jam_the_broker(broker: MemoryBroker) -> None:
    received: list[Delivery] = []

    def receive(delivery: Delivery) -> None:
        received.append(delivery)
        if len(received) == 1:
            raise KeyboardInterrupt

    broker.consume(config(), receive).request(10)
    with pytest.raises(KeyboardInterrupt):
        publish(broker, b"1")

    publish(broker, b"2")

    assert [d.data for d in received] == [b"1", b"2"]
