"""What the contract tests say briefly: publish, consume, collect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flask_natspubsub.brokers.base import (
    Broker,
    ConsumerConfig,
    ConsumerInfo,
    Consumption,
    Delivery,
    StoredAck,
    StreamConfig,
    StreamInfo,
)
from flask_natspubsub.errors import PublishError
from flask_natspubsub.messages.message import Message
from tests.support.waiting import eventually

TIMEOUT = 10.0


@dataclass
class Inbox:
    """Receives deliveries, and does ``then`` with each."""

    then: Callable[[Delivery], None] | None = None
    received: list[Delivery] = field(default_factory=list)

    def __call__(self, delivery: Delivery) -> None:
        self.received.append(delivery)
        if self.then:
            self.then(delivery)

    def wait(self, count: int, timeout: float = TIMEOUT) -> list[Delivery]:
        """Wait for ``count`` deliveries in all, and see that there are not more."""
        eventually(
            lambda: len(self.received) >= count,
            timeout,
            f"{count} deliveries expected within {timeout} s",
        )
        assert len(self.received) == count
        return self.received

    def wait_for(self, payload: bytes, timeout: float = TIMEOUT) -> None:
        """Wait for a delivery of ``payload``, whatever else arrives."""
        eventually(lambda: payload in self.payloads, timeout, f"{payload!r} did not arrive")

    @property
    def payloads(self) -> list[bytes]:
        return [delivery.data for delivery in self.received]


def ack(delivery: Delivery) -> None:
    delivery.ack()


@dataclass
class Place:
    """A broker with an environment of its own: stream, subjects and consumers."""

    broker: Broker
    env: str

    @property
    def stream(self) -> str:
        return f"{self.env}-events-stream"

    def subject(self, topic: str) -> str:
        return f"{self.env}.shop.{topic}"

    def config(self, **changes: Any) -> StreamConfig:
        values = {"name": self.stream, "subjects": (f"{self.env}.shop.>",), **changes}
        return StreamConfig(**values)

    def make_stream(self, **changes: Any) -> None:
        self.broker.setup([self.config(**changes)])

    def message(
        self, payload: bytes = b"{}", topic: str = "order.created", **headers: str
    ) -> Message:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return Message(self.subject(topic), payload, names)

    def submit(self, *messages: Message) -> list[StoredAck | PublishError | None]:
        ticket = self.broker.submit(messages, TIMEOUT)
        assert ticket.wait(TIMEOUT + 0.5)
        return ticket.results

    def publish(self, *payloads: bytes, topic: str = "order.created") -> list[StoredAck]:
        acks = self.submit(*(self.message(payload, topic) for payload in payloads))
        assert all(isinstance(result, StoredAck) for result in acks), acks
        return acks  # type: ignore[return-value]  # just checked

    def refused(self, message: Message) -> PublishError:
        (result,) = self.submit(message)
        assert isinstance(result, PublishError), result
        return result

    def consumer(self, durable: str = "mailer", **options: Any) -> ConsumerConfig:
        filters = options.pop("filters", (self.subject(">"),))
        return ConsumerConfig(
            stream=self.stream, durable=durable, filter_subjects=filters, **options
        )

    def consume(
        self,
        durable: str = "mailer",
        *,
        then: Callable[[Delivery], None] | None = None,
        credits: int = 0,
        **options: Any,
    ) -> tuple[Inbox, Consumption]:
        inbox = Inbox(then)
        consumption = self.broker.consume(self.consumer(durable, **options), inbox)
        if credits:
            consumption.request(credits)
        return inbox, consumption

    def info(self) -> StreamInfo:
        info = self.broker.stream_info(self.stream)
        assert info is not None
        return info

    def consumer_info(self, durable: str = "mailer") -> ConsumerInfo:
        info = self.broker.consumer_info(self.stream, durable)
        assert info is not None
        return info

    def wait_until_settled(self, durable: str = "mailer") -> None:
        """Wait until the consumer has nothing new and nothing unsettled."""
        eventually(lambda: self.is_settled(durable))

    def is_settled(self, durable: str = "mailer") -> bool:
        info = self.consumer_info(durable)
        return info.pending == 0 and info.ack_pending == 0


def size_on_the_wire(payload: bytes, headers: Mapping[str, str]) -> int:
    """Bytes that count against the server's limit, from the protocol's description."""
    if not headers:
        return len(payload)
    block = "NATS/1.0\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
    return len(block.encode()) + len(payload)
