"""The draft, the receipt and the publication: what publishing takes and gives."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from ..errors import InvalidTopic
from ..messages.ids import derived_event_id
from ..messages.message import Message
from ..signals import call_guarded


class PublishReceipt(msgspec.Struct, frozen=True, gc=False):
    """The outcome of one published message.

    ``stream`` and ``sequence`` say where it is stored (None while it is in the outbox);
    ``duplicate`` is True when the stream had this ``event_id`` already.
    """

    event_id: str
    topic: str
    subject: str
    stream: str | None
    sequence: int | None
    duplicate: bool
    status: Literal["stored", "outbox"]


class Draft(msgspec.Struct):
    """A message as its publisher gives it; publish middleware may change it.

    :param topic: as the caller wrote it.
    :param message: the payload: dict, dataclass, msgspec Struct or pydantic model.
    :param event: domain, resource and action of the event form.
    :param outbox: through the outbox or not; None for ``NATSPUBSUB_USE_OUTBOX``.
    :param ordering_key: outbox rows with the same key are sent one after the other.
    :param delay: seconds (or a timedelta) for which the outbox keeps the message back.
    :param available_at: an aware datetime before which the outbox keeps it back.
    :param traceparent: the W3C trace context to send; default: that of the request or of the
        message being handled.
    """

    topic: str
    message: Any
    event_id: str | None = None
    trace_id: str | None = None
    occurred_at: dt.datetime | None = None
    correlation_id: str | None = None
    causation_id: str | None = None
    message_type: str | None = None
    headers: Mapping[str, str] = {}
    event: tuple[str, str, str] | None = None
    outbox: bool | None = None
    ordering_key: str | None = None
    delay: float | dt.timedelta | None = None
    available_at: dt.datetime | None = None
    traceparent: str | None = None


class Publication:
    """What ``call_next()`` gives publish middleware: one message, and what becomes of it.

    In ``publish`` it is done when ``call_next()`` returns. Where several messages are sent
    together, and in ``publish_nowait`` and ``publish_async``, it is done later: see ``on_done``.

    :param event_id: the message's id; with ``topic`` and ``subject`` it is known from the start.
    """

    __slots__ = ("_callbacks", "event_id", "result", "subject", "topic")

    def __init__(self, event_id: str, topic: str, subject: str) -> None:
        self.event_id = event_id
        self.topic = topic
        self.subject = subject
        #: The receipt, or the error that kept it from being published; None while it is not known.
        self.result: PublishReceipt | Exception | None = None
        self._callbacks: list[Callable[[Publication], object]] = []

    @property
    def receipt(self) -> PublishReceipt | None:
        """The receipt, once the message is stored or written to the outbox."""
        return self.result if isinstance(self.result, PublishReceipt) else None

    @property
    def status(self) -> Literal["pending", "stored", "outbox", "failed"]:
        """``pending`` while there is no result, ``failed`` after an error."""
        if self.receipt is not None:
            return self.receipt.status
        return "pending" if self.result is None else "failed"

    @property
    def stream(self) -> str | None:
        """The stream that stored it; None while it is not known, or in the outbox."""
        return self.receipt.stream if self.receipt is not None else None

    @property
    def sequence(self) -> int | None:
        """Its number in the stream; None while it is not known, or in the outbox."""
        return self.receipt.sequence if self.receipt is not None else None

    @property
    def duplicate(self) -> bool:
        """Whether the stream or the outbox had this ``event_id`` already."""
        return self.receipt is not None and self.receipt.duplicate

    def on_done(self, callback: Callable[[Publication], object]) -> None:
        """Call ``callback(publication)`` when there is a result, at once if there is one.

        It may run in the broker's thread, so it must not wait; what it raises is logged.
        """
        self._callbacks.append(callback)
        if self.result is not None:
            self._call_back()

    def set_result(self, result: PublishReceipt | Exception) -> None:
        """Set the result; a second one is ignored."""
        if self.result is None:
            self.result = result
            self._call_back()

    def _call_back(self) -> None:
        while self._callbacks:
            call_guarded("a callback of publish middleware", self._callbacks.pop(), self)


class Prepared(Message, frozen=True, gc=False):
    """A message that can be sent, or written to the outbox.

    :param named: whether the caller gave the event id, which may then be there already.
    :param delay: seconds; ``available_at``: seconds since the epoch.
    :param publication: what publish middleware holds of it.
    """

    event_id: str
    topic: str
    outbox: bool = False
    named: bool = False
    ordering_key: str | None = None
    delay: float | None = None
    available_at: float | None = None
    publication: Publication | None = None


def drafts_for(topics: Any, message: Any, **options: Any) -> list[Draft]:
    """Make a draft for the topic or for each of a list; later ids derive from a given one."""
    if not isinstance(topics, (list, tuple)):
        return [Draft(topics, message, **options)]
    if not topics:
        raise InvalidTopic("The list of topics is empty.", "Give one topic or more.")
    drafts = [Draft(topic, message, **options) for topic in topics]
    for draft in drafts[1:]:
        if draft.event_id is not None:
            draft.event_id = derived_event_id(draft.event_id, draft.topic)
    return drafts
