"""Flask-NatsPubsub: publish and subscribe over NATS JetStream from Flask."""

from __future__ import annotations

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
from .publishing.draft import Draft, PublishReceipt
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

__version__ = "0.1.0"

__all__ = [
    "BrokerError",
    "CircuitOpen",
    "ConfigurationError",
    "DatabaseError",
    "DeadLetter",
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
    "PublishDenied",
    "PublishError",
    "PublishReceipt",
    "RegistrationError",
    "ReplayRefused",
    "RequestDenied",
    "Retry",
    "Subscriber",
    "SubscriberGroup",
    "TablesMissing",
    "TopologyError",
    "TraceIdFilter",
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
