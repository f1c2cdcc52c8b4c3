"""What a handler knows about its message besides the payload."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

from werkzeug.local import LocalProxy


@dataclass(slots=True, kw_only=True)
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
    headers: Mapping[str, str]
    raw: bytes
    envelope: Mapping[str, Any]
    subscriber: str


_current: ContextVar[MessageContext] = ContextVar("flask_natspubsub.current_message")

#: The context of the message being handled; any other use of it raises RuntimeError.
current_message: MessageContext = LocalProxy(  # type: ignore[assignment]  # stands in for it
    _current,
    unbound_message=(
        "No message is being handled here. 'current_message' works inside a subscriber's "
        "handler and its middleware; in a thread started there, pass the context on yourself."
    ),
)


def enter(context: MessageContext) -> Token[MessageContext]:
    """Make ``context`` the ``current_message``; pass the token to ``leave``."""
    return _current.set(context)


def leave(token: Token[MessageContext]) -> None:
    """Restore what was the ``current_message`` before ``enter``."""
    _current.reset(token)
