"""Flask-NatsPubsub: publish and subscribe over NATS JetStream from Flask."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .errors import (
    BrokerError,
    CircuitOpen,
    ConfigurationError,
    DatabaseError,
    DeadLetter,
    DecodingError,
    Discard,
    EncodingError,
    HandlerInterrupted,
    HandlerTimeout,
    InboxBusy,
    InvalidTopic,
    NatsPubsubError,
    NeverFinished,
    NoStreamForSubject,
    NotASubject,
    NotConnected,
    PayloadTooLarge,
    PublishDenied,
    PublishError,
    RegistrationError,
    ReplayRefused,
    RequestDenied,
    Retry,
    TablesMissing,
    TopologyError,
)
from .extension import NatsPubsub
from .observability.tracing import TraceIdFilter, current_trace_id
from .publishing.batch import Batch
from .publishing.draft import Draft, Publication, PublishReceipt
from .publishing.publisher import PartlyPublished
from .signals import (
    message_dead_lettered,
    message_handled,
    message_published,
    message_received,
    message_retried,
    outbox_relayed,
    worker_started,
    worker_stopped,
)
from .subscribing.context import MessageContext, current_message
from .subscribing.registry import SubscriberGroup
from .subscribing.subscriber import Subscriber

if TYPE_CHECKING:
    from .brokers.base import StoredAck
    from .deadletters.reader import DeadLetterRecord, DeadLetters
    from .outbox.relay import Relay
    from .outbox.verification import SentEvents, Verification
    from .worker.worker import Worker

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BrokerError",
    "CircuitOpen",
    "ConfigurationError",
    "DatabaseError",
    "DeadLetter",
    "DeadLetterRecord",
    "DeadLetters",
    "DecodingError",
    "Discard",
    "Draft",
    "EncodingError",
    "HandlerInterrupted",
    "HandlerTimeout",
    "InboxBusy",
    "InvalidTopic",
    "MessageContext",
    "NatsPubsub",
    "NatsPubsubError",
    "NeverFinished",
    "NoStreamForSubject",
    "NotASubject",
    "NotConnected",
    "PartlyPublished",
    "PayloadTooLarge",
    "Publication",
    "PublishDenied",
    "PublishError",
    "PublishReceipt",
    "RegistrationError",
    "Relay",
    "ReplayRefused",
    "RequestDenied",
    "Retry",
    "SentEvents",
    "StoredAck",
    "Subscriber",
    "SubscriberGroup",
    "TablesMissing",
    "TopologyError",
    "TraceIdFilter",
    "Verification",
    "Worker",
    "current_message",
    "current_trace_id",
    "message_dead_lettered",
    "message_handled",
    "message_published",
    "message_received",
    "message_retried",
    "outbox_relayed",
    "worker_started",
    "worker_stopped",
]

#: Imported at first use: their modules bring asyncio or SQLAlchemy, or are seldom needed.
_LAZY = {
    "DeadLetterRecord": ".deadletters.reader",
    "DeadLetters": ".deadletters.reader",
    "Relay": ".outbox.relay",
    "SentEvents": ".outbox.verification",
    "StoredAck": ".brokers.base",
    "Verification": ".outbox.verification",
    "Worker": ".worker.worker",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
