"""A message as another has sent it: any of the packages that speak the wire format.

``read`` is lenient about all but the message itself.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from typing import Annotated, Any, Protocol

import msgspec

from ..errors import DecodingError
from ..text import printable
from .codec import decode_object
from .envelope import CONTROL, MAX_IDENTIFIER_LENGTH
from .ids import parse_timestamp
from .plain import MAX_DEPTH
from .subjects import topic_of


class Received(msgspec.Struct, frozen=True, gc=False):
    """One message as it was received.

    :param event_id: of a message without one, its place in the stream: ``is_named`` is False.
    :param message: its body.
    :param data: what ``message`` was decoded from, with everything around it.
    """

    event_id: str
    topic: str
    message: Any
    message_type: str | None
    producer: str | None
    trace_id: str | None
    correlation_id: str | None
    causation_id: str | None
    occurred: str | None
    data: bytes
    is_named: bool = True

    # Few handlers ask for these, and to make them takes as long as all else here.

    @property
    def occurred_at(self) -> dt.datetime | None:
        """When it happened, as the publisher says; None if it says nothing that can be read."""
        return _time(self.occurred)

    @property
    def envelope(self) -> dict[str, Any]:
        """Every key around the message, known or not, as received; none without an envelope."""
        return decode_object(self.data) if self.data else {}


class Readable(Protocol):
    """A message with its place in a stream: a delivery, or one that was only looked up."""

    @property
    def data(self) -> bytes:
        """The bytes received."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers received."""

    @property
    def subject(self) -> str:
        """The subject that it was sent to."""

    @property
    def stream(self) -> str:
        """The stream that stores it."""

    @property
    def sequence(self) -> int:
        """Its number there."""


def read(source: Readable) -> Received:
    """Read a message of any of the packages that speak the wire format.

    What is missing or of the wrong type beside the message is None, or taken from the
    headers, the subject or the place in the stream; it is never an error.

    :raises DecodingError: no JSON object, or none with a message in it.
    """
    data = source.data
    fields = _usual_fields(data) or _lenient_fields(decode_object(data))
    event_id = fields.event_id or _header_id(source.headers)
    return Received(
        event_id or f"{source.stream}:{source.sequence}",
        fields.topic or printable(topic_of(source.subject)),
        fields.message,
        fields.message_type,
        fields.producer,
        fields.trace_id,
        fields.correlation_id,
        fields.causation_id,
        fields.occurred_at,
        data,
        event_id is not None,
    )


def read_or_none(source: Readable) -> Received | None:
    """Read a message as ``read`` does; None if it cannot be read."""
    try:
        return read(source)
    except DecodingError:
        return None


def read_plain(message: Any, source: Readable) -> Received:
    """Take a message of another system, which has no envelope: its headers say what is known."""
    event_id = _header_id(source.headers)
    return Received(
        event_id or f"{source.stream}:{source.sequence}",
        printable(source.subject),
        message,
        None,
        None,
        _text(source.headers.get("trace_id")),
        None,
        None,
        None,
        b"",
        event_id is not None,
    )


_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_IDENTIFIER_LENGTH)]


class _Fields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """The keys of an envelope as this package writes it."""

    event_id: _Text | None = None
    schema_version: Any = None
    topic: _Text | None = None
    message_type: _Text | None = None
    producer: _Text | None = None
    occurred_at: str | None = None
    trace_id: _Text | None = None
    message: dict[str, Any]
    domain: Any = None
    resource: Any = None
    action: Any = None
    resource_id: Any = None
    correlation_id: _Text | None = None
    causation_id: _Text | None = None


_FIELDS = msgspec.json.Decoder(_Fields)


def _usual_fields(data: bytes) -> _Fields | None:
    """Read what is as it should be, in one go; None if anything needs a closer look."""
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH:
        return None  # more brackets than levels allowed, however they are nested
    try:
        fields = _FIELDS.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    texts = (
        fields.event_id, fields.topic, fields.message_type, fields.producer,
        fields.trace_id, fields.correlation_id, fields.causation_id,
    )  # fmt: skip
    joined = "".join(filter(None, texts))
    usual = fields.topic is not None and joined.isprintable() and " " not in joined
    return fields if usual else None


def _lenient_fields(envelope: dict[str, Any]) -> _Fields:
    occurred_at = envelope.get("occurred_at")
    return _Fields(
        event_id=_event_id(envelope),
        topic=_topic(envelope),
        message_type=_text(envelope.get("message_type")),
        producer=_text(envelope.get("producer")),
        trace_id=_text(envelope.get("trace_id")),
        correlation_id=_text(envelope.get("correlation_id")),
        causation_id=_text(envelope.get("causation_id")),
        occurred_at=occurred_at if isinstance(occurred_at, str) else None,
        message=_body(envelope),
    )


def _body(envelope: dict[str, Any]) -> dict[str, Any]:
    body = envelope.get("message")
    if body is None:
        body = envelope.get("payload")
    if not isinstance(body, dict):
        raise DecodingError(
            "The envelope has no object under 'message' or 'payload'.",
            'Messages look like {"event_id": "...", "topic": "...", "message": {...}}.',
        )
    return body


def _event_id(envelope: dict[str, Any]) -> str | None:
    own = envelope.get("event_id")
    return _text(str(own) if type(own) in (int, float) else own)


def _header_id(headers: Mapping[str, str]) -> str | None:
    return _text(headers.get("Nats-Msg-Id")) or _text(headers.get("nats-msg-id"))


def _topic(envelope: dict[str, Any]) -> str | None:
    topic = _text(envelope.get("topic"))
    if topic is not None:
        return topic
    parts = [_text(envelope.get(key)) for key in ("domain", "resource", "action")]
    return ".".join(part for part in parts if part) if all(parts) else None


def _text(value: object) -> str | None:
    """Return ``value`` if it is text fit for ids, logs and headers; it may be hostile."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_IDENTIFIER_LENGTH:
        return None
    if value.isspace() or (not value.isprintable() and re.search(CONTROL, value)):
        return None
    return value


def _time(text: str | None) -> dt.datetime | None:
    try:
        return None if text is None else parse_timestamp(text)
    except ValueError:
        return None
