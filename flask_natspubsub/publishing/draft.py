"""What a publisher says, checked and encoded: before anything is sent or written."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from ..brokers.base import OutgoingMessage, StoredAck
from ..config.parsers import seconds
from ..config.settings import Settings
from ..errors import ConfigurationError, EncodingError, InvalidTopic
from ..messages.codec import message_type_of
from ..messages.envelope import (
    SCHEMA_VERSION,
    Envelope,
    check_identifier,
    headers_for,
    resource_id_of,
)
from ..messages.ids import derived_event_id, format_timestamp, new_event_id, now_timestamp
from ..messages.lineage import Lineage
from ..messages.plain import plain_object
from ..messages.subjects import subject_for


class PublishReceipt(msgspec.Struct, frozen=True, gc=False):
    """What became of one published message.

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


class Prepared(msgspec.Struct, frozen=True, gc=False):
    """A message that can be sent, or written to the outbox.

    :param named: whether the caller gave the event id, which may then be there already.
    :param delay: seconds; ``available_at``: seconds since the epoch.
    """

    event_id: str
    topic: str
    outgoing: OutgoingMessage
    outbox: bool = False
    named: bool = False
    ordering_key: str | None = None
    delay: float | None = None
    available_at: float | None = None

    def receipt(self, ack: StoredAck) -> PublishReceipt:
        """Make the receipt of a stored message."""
        return PublishReceipt(
            self.event_id,
            self.topic,
            self.outgoing.subject,
            ack.stream,
            ack.sequence,
            ack.duplicate,
            "stored",
        )

    def outbox_receipt(self, *, duplicate: bool) -> PublishReceipt:
        """Make the receipt of an outbox row."""
        subject = self.outgoing.subject
        return PublishReceipt(self.event_id, self.topic, subject, None, None, duplicate, "outbox")


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


def prepare(draft: Draft, settings: Settings, lineage: Lineage) -> Prepared:
    """Check and encode; every error here is the caller's to mend, and nothing was sent.

    :param lineage: the ids that the message inherits.
    """
    subject = subject_for(settings.env, settings.app_name, draft.topic)
    envelope = _envelope(draft, settings.app_name, lineage)
    headers = headers_for(envelope, draft.headers, lineage.traceparent)
    outgoing = OutgoingMessage(subject, envelope.encode(), headers)
    outbox = settings.use_outbox if draft.outbox is None else draft.outbox
    named = draft.event_id is not None
    if not outbox:
        if draft.delay is not None or draft.available_at is not None:
            raise _needs_outbox()
        return Prepared(envelope.event_id, draft.topic, outgoing, False, named)
    delay, available_at = _due(draft)
    key = _identifier(draft.ordering_key, "ordering_key")
    return Prepared(envelope.event_id, draft.topic, outgoing, True, named, key, delay, available_at)


def _needs_outbox() -> ConfigurationError:
    return ConfigurationError(
        "A message with delay= or available_at= needs the outbox, which keeps it until then.",
        "Publish it with outbox=True, or set NATSPUBSUB_USE_OUTBOX.",
    )


def _envelope(draft: Draft, producer: str, lineage: Lineage) -> Envelope:
    own = draft.event_id, draft.trace_id, draft.correlation_id, draft.causation_id
    if own != _NO_IDS:
        for value, name in zip(own, _ID_NAMES, strict=True):
            _identifier(value, name)
    event_id, trace_id, correlation_id, causation_id = own
    message = plain_object(draft.message)
    domain = resource = action = resource_id = None
    if draft.event is not None:
        domain, resource, action = draft.event
        resource_id = resource_id_of(message)
    occurred_at = draft.occurred_at
    return Envelope(
        event_id=event_id or new_event_id(),
        topic=draft.topic,
        producer=producer,
        occurred_at=now_timestamp() if occurred_at is None else format_timestamp(occurred_at),
        schema_version=SCHEMA_VERSION,
        message=message,
        message_type=draft.message_type or message_type_of(draft.message),
        trace_id=trace_id or lineage.trace_id,
        domain=domain,
        resource=resource,
        action=action,
        resource_id=resource_id,
        correlation_id=correlation_id or lineage.correlation_id,
        causation_id=causation_id or lineage.causation_id,
    )


_ID_NAMES = ("event_id", "trace_id", "correlation_id", "causation_id")
_NO_IDS = (None,) * len(_ID_NAMES)


def _due(draft: Draft) -> tuple[float | None, float | None]:
    """Return the delay in seconds, and the time since the epoch, that a draft asks for."""
    if draft.delay is None and draft.available_at is None:
        return None, None
    try:
        delay = None if draft.delay is None else seconds(draft.delay)
    except ValueError as error:
        raise EncodingError(
            f"delay is {draft.delay!r}.", f"Allowed: {error}.", path="delay"
        ) from None
    at = draft.available_at
    if at is not None and getattr(at, "tzinfo", None) is None:
        raise EncodingError(
            f"available_at is {at!r}.", "Allowed: an aware datetime.", path="available_at"
        )
    return delay, None if at is None else at.timestamp()


def _identifier(value: str | None, name: str) -> str | None:
    return None if value is None else check_identifier(value, name)
