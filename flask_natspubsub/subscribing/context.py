"""What a handler knows about its message besides the payload."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from werkzeug.local import LocalProxy

from ..messages.headers import Headers

if TYPE_CHECKING:
    from ..brokers.base import Delivery
    from ..messages.received import Received


# A written repr is shorter, has no payload in it, and costs the import less than a made one.
@dataclass(slots=True, kw_only=True, eq=False, repr=False, match_args=False)
class MessageContext:
    """The second argument of a handler: one delivery of one message."""

    #: The event's id, the same in every delivery.
    event_id: str
    #: The topic as its publisher wrote it.
    topic: str
    #: The NATS subject that it was published on.
    subject: str
    #: The stream that stores it.
    stream: str
    #: Its number in the stream.
    sequence: int
    #: The trace that it belongs to; None without one.
    trace_id: str | None
    #: The id that all events of one chain of events share; None without one.
    correlation_id: str | None
    #: The id of the event whose handler published this one; None if no handler did.
    causation_id: str | None
    #: The name of the app that published it; None if the message does not say.
    producer: str | None
    #: When it happened, as the publisher says; aware, UTC.
    occurred_at: dt.datetime
    #: When the stream stored it; aware, UTC.
    published_at: dt.datetime
    #: The number of its deliveries to this subscriber so far; 1 is the first.
    attempt: int
    #: Its headers as a dict. Of a header sent more than once it has the first value;
    #: ``headers.getlist(name)`` has all.
    headers: Headers
    #: The bytes received.
    raw: bytes
    #: The JSON object around the message, every key of it; empty without an envelope.
    envelope: Mapping[str, Any]
    #: The name of the subscriber that handles it.
    subscriber: str

    def __repr__(self) -> str:
        return f"<MessageContext {self.topic} {self.event_id} attempt {self.attempt}>"


class DeliveryContext(MessageContext):
    """The context of a delivery. Fields that cost more than an assignment wait for their first use.

    Few handlers use them, and making them takes as long as decoding the message.
    """

    __slots__ = ("_delivery", "_received")

    _delivery: Delivery
    _received: Received

    @classmethod
    def of(cls, delivery: Delivery, received: Received, subscriber: str) -> Self:
        """Make the context; ``__init__``, which takes all fields, is for changed copies."""
        context = cls.__new__(cls)
        context._delivery = delivery
        context._received = received
        context.event_id = received.event_id
        context.topic = received.topic
        context.subject = delivery.subject
        context.stream = delivery.stream
        context.sequence = delivery.sequence
        context.trace_id = received.trace_id
        context.correlation_id = received.correlation_id
        context.causation_id = received.causation_id
        context.producer = received.producer
        context.attempt = delivery.attempt
        context.raw = delivery.data
        context.subscriber = subscriber
        return context

    def __getattr__(self, field: str) -> Any:
        """Fill a slot that is still empty."""
        make = _AT_FIRST_USE.get(field)
        if make is None:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {field!r}", name=field, obj=self
            )
        value = make(self._delivery, self._received)
        setattr(self, field, value)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        """Be copied and pickled without the delivery, which belongs to this process."""
        fields = {name: getattr(self, name) for name in MessageContext.__dataclass_fields__}
        return functools.partial(MessageContext, **fields), ()


def _published_at(delivery: Delivery) -> dt.datetime:
    return dt.datetime.fromtimestamp(delivery.timestamp, dt.UTC)


_AT_FIRST_USE: dict[str, Callable[[Delivery, Received], Any]] = {
    "occurred_at": lambda delivery, received: received.occurred_at or _published_at(delivery),
    "published_at": lambda delivery, received: _published_at(delivery),
    "headers": lambda delivery, received: Headers(delivery.headers),
    "envelope": lambda delivery, received: received.envelope,
}


#: The context of the message being handled, for whoever handles it.
CURRENT: ContextVar[MessageContext] = ContextVar("flask_natspubsub.current_message")

#: The context of the message being handled; any other use of it raises RuntimeError.
current_message: MessageContext = LocalProxy(  # type: ignore[assignment]  # stands in for it
    CURRENT,
    unbound_message=(
        "No message is being handled here. 'current_message' works inside a subscriber's "
        "handler and its middleware; in a thread started there, pass the context on yourself."
    ),
)
