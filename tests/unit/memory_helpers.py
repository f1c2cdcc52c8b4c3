"""What the tests of the broker in memory say briefly."""

from __future__ import annotations

from typing import Any

from flask_natspubsub.brokers.base import ConsumerConfig, Delivery, StreamConfig
from flask_natspubsub.brokers.memory.broker import MemoryBroker
from flask_natspubsub.brokers.memory.clock import VirtualClock
from flask_natspubsub.messages.message import Message

STREAM = "events"


def config(durable: str = "mailer", **options: Any) -> ConsumerConfig:
    values = {"ack_wait": 30.0, "filter_subjects": ("shop.>",), **options}
    return ConsumerConfig(stream=STREAM, durable=durable, **values)


def stream_config(**options: Any) -> StreamConfig:
    return StreamConfig(name=STREAM, subjects=("shop.>",), **options)


def publish(broker: MemoryBroker, *payloads: bytes, subject: str = "shop.a") -> list[Any]:
    return broker.submit([Message(subject, p, {}) for p in payloads], 1.0).results


def fetch(broker: MemoryBroker, count: int = 100, durable: str = "mailer") -> list[Delivery]:
    return list(broker.fetch(STREAM, durable, count))


def broker_on_a_virtual_clock(**stream_options: Any) -> MemoryBroker:
    """A broker with a stream and the consumer ``mailer``."""
    broker = MemoryBroker(VirtualClock(1_700_000_000.1))
    broker.setup([stream_config(**stream_options)])
    broker.add_consumer(config())
    return broker
