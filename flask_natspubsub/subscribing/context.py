"""What a handler knows about its message besides the payload."""

from __future__ import annotations

import datetime as dt
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
    """The second argument of a handler: one delivery of one message.

    :param event_id: the event's id, the same in every delivery.
    :param topic: the topic as its publisher wrote it.
    :param stream: the stream it is stored in, at ``sequence``.
    :param causation_id: the id of the event whose handler published this one.
    :param producer: the app that published it.
    :param occurred_at: when it happened, as the publisher says; aware, UTC.
    :param published_at: when the stream stored it; aware, UTC.
    :param attempt: how often it has been delivered to this subscriber; 1 is the first time.
    :param headers: a dict; of a header sent more than once it has the first value, and
        ``headers.getlist(name)`` has all.
    :param raw: the bytes received; ``envelope`` is the JSON object in them.
    :param subscriber: the name of the subscriber that handles it.
    """

    event_id: str
    topic: str
    subject: str
    stream: str
    sequence: int
    trace_id: str | None
    correlation_id: str | None
    causation_id: str | None
    producer: str | None
    occurred_at: dt.datetime
    published_at: dt.datetime
    attempt: int
    headers: Headers
    raw: bytes
    envelope: Mapping[str, Any]
    subscriber: str

    def __repr__(self) -> str:
        return f"<MessageContext {self.topic} {self.event_id} attempt {self.attempt}>"


_Source = Callable[["Delivery", "Received", str], Any]

#: Where each field of a context comes from.
_SOURCES: dict[str, _Source] = {
    "event_id": lambda delivery, received, name: received.event_id,
    "topic": lambda delivery, received, name: received.topic,
    "subject": lambda delivery, received, name: delivery.subject,
    "stream": lambda delivery, received, name: delivery.stream,
    "sequence": lambda delivery, received, name: delivery.sequence,
    "trace_id": lambda delivery, received, name: received.trace_id,
    "correlation_id": lambda delivery, received, name: received.correlation_id,
    "causation_id": lambda delivery, received, name: received.causation_id,
    "producer": lambda delivery, received, name: received.producer,
    "occurred_at": lambda delivery, received, name: received.occurred_at or _published(delivery),
    "published_at": lambda delivery, received, name: _published(delivery),
    "attempt": lambda delivery, received, name: delivery.attempt,
    "headers": lambda delivery, received, name: Headers(delivery.headers),
    "raw": lambda delivery, received, name: delivery.data,
    "envelope": lambda delivery, received, name: received.envelope,
    "subscriber": lambda delivery, received, name: name,
}


def _published(delivery: Delivery) -> dt.datetime:
    return dt.datetime.fromtimestamp(delivery.timestamp, dt.UTC)


class DeliveryContext(MessageContext):
    """The context of a delivery: each field is made when it is first asked for.

    Handlers ask for one or two, many for none, and to make them all takes as long as to
    decode the message.
    """

    __slots__ = ("_from",)

    _from: tuple[Delivery, Received, str]

    @classmethod
    def of(cls, delivery: Delivery, received: Received, subscriber: str) -> Self:
        """Make the context without its fields; ``__init__`` takes them, for copies."""
        context = cls.__new__(cls)
        context._from = delivery, received, subscriber
        return context

    def __getattr__(self, field: str) -> Any:
        """Fill a slot that is empty so far."""
        source = _SOURCES.get(field)
        if source is None:
            raise AttributeError(field, name=field, obj=self)
        value = source(*self._from)
        setattr(self, field, value)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        """Be copied and pickled without what belongs to this process."""
        return _with_fields, ({field: getattr(self, field) for field in _SOURCES},)


def _with_fields(fields: dict[str, Any]) -> MessageContext:
    return MessageContext(**fields)


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
