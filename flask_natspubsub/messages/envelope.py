"""The JSON object around each message, and the headers beside it.

``Envelope`` is what is sent, in the order and form the wire format asks for; ``read`` takes
what any of the packages that speak it has sent, and is lenient about all but the message.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from ..errors import DecodingError, EncodingError
from .codec import decode_object, is_surely_shallow
from .ids import parse_timestamp
from .plain import one_line
from .subjects import topic_of

#: Longest event id, trace id or other identifier, in characters.
MAX_IDENTIFIER_LENGTH = 255

SCHEMA_VERSION = 1

_OWN_HEADERS = frozenset({"topic", "trace_id", "traceparent"})
_HEADER_NAME = re.compile(r"[!-9;-~]+")  # printable ASCII without space and colon
_IDENTIFIER = re.compile(rf"[!-~]{{1,{MAX_IDENTIFIER_LENGTH}}}")
# With the separators of lines and paragraphs, and what turns the direction of a text round.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_ENCODER = msgspec.json.Encoder()


# --- sending -------------------------------------------------------------------------------


class Envelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One message to be sent.

    :param topic: as the caller wrote it, not normalised.
    :param occurred_at: as ``ids.format_timestamp`` writes it.
    :param schema_version: ``SCHEMA_VERSION``.
    :param message: the encoded JSON object.
    :param resource_id: in plain form, see ``plain.to_plain``.
    """

    # The fields are in the order of the wire: the encoder keeps it, and leaves out what is None.
    event_id: str
    schema_version: int
    topic: str
    message_type: str | None = None
    producer: str
    occurred_at: str
    trace_id: str | None = None
    message: msgspec.Raw
    domain: str | None = None
    resource: str | None = None
    action: str | None = None
    resource_id: Any = None
    correlation_id: str | None = None
    causation_id: str | None = None

    def encode(self) -> bytes:
        """Return the bytes of the payload.

        :raises EncodingError: a text of the envelope is not valid Unicode.
        """
        try:
            return _ENCODER.encode(self)
        except (UnicodeEncodeError, TypeError) as error:
            raise EncodingError(f"The envelope has no JSON form: {error}.") from None


def headers_for(
    envelope: Envelope,
    extra: Mapping[str, str] | None = None,
    traceparent: str | None = None,
) -> dict[str, str]:
    """Return the headers of a message, in the order they are sent.

    :param extra: the caller's own.
    :param traceparent: the W3C trace context, if there is one.
    :raises EncodingError: a header of ``extra`` cannot be sent; see ``check_headers``.
    """
    # A topic may have any character; the header is one line all the same.
    topic = envelope.topic
    headers = {"topic": topic if topic.isprintable() else _CONTROL.sub("_", topic)}
    if envelope.trace_id is not None:
        headers["trace_id"] = envelope.trace_id
    headers["Nats-Msg-Id"] = envelope.event_id
    if traceparent is not None:
        headers["traceparent"] = traceparent
    if extra:
        check_headers(extra)
        headers.update(extra)
    return headers


def check_headers(headers: Mapping[str, str]) -> None:
    """Check headers that a caller wants to send along.

    :raises EncodingError: not a mapping of text to text; a name that NATS or the extension
        uses itself or that a header cannot have; a control character in a value.
    """
    if not isinstance(headers, Mapping):
        raise _bad_headers(headers)
    for name, value in headers.items():
        _check_header_name(name)
        if not _is_one_line(value):
            raise EncodingError(
                f"The header {name!r:.80} is not text, or has a line break or control character.",
                "Header values are one line of text.",
                path=f"headers.{name:.80}",
            )


def _bad_headers(headers: object) -> EncodingError:
    return EncodingError(
        f"Headers are a dict of names and texts, not {type(headers).__name__}.",
        "Use headers={'name': 'text'}.",
        path="headers",
    )


def _check_header_name(name: object) -> None:
    if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
        problem, fix = "cannot be sent", "Use printable ASCII without spaces and ':'."
    elif name.lower().startswith("nats-") or name.lower() in _OWN_HEADERS:
        problem, fix = "is not free: NATS or the extension sets it", "Use another name."
    else:
        return
    raise EncodingError(
        f"The header name {name!r:.80} {problem}.", fix, path=f"headers.{one_line(name)}"
    )


def _is_one_line(value: object) -> bool:
    return isinstance(value, str) and not _CONTROL.search(value)


def check_identifier(value: str, what: str) -> str:
    """Return ``value`` if it can be an id: printable ASCII without spaces, 255 at most.

    :param what: its name, such as ``event_id``, for the error.
    :raises EncodingError: it cannot; ``path`` is ``what``.
    """
    if not _is_identifier(value):
        raise EncodingError(
            f"The {what} {value!r:.80} cannot be sent.",
            f"Use 1 to {MAX_IDENTIFIER_LENGTH} printable ASCII characters without spaces.",
            path=what,
        )
    return value


def _is_identifier(value: object) -> bool:
    return isinstance(value, str) and _IDENTIFIER.fullmatch(value) is not None


def resource_id_of(message: Mapping[str, Any]) -> Any:
    """Return the ``resource_id`` of an event: the message's ``id``, None if it has none."""
    return message.get("id") or None


# --- reading -------------------------------------------------------------------------------


class Received(msgspec.Struct, frozen=True, gc=False):
    """One message as it was received.

    :param message: its body.
    :param data: what ``message`` was decoded from, with everything around it.
    """

    event_id: str
    topic: str
    message: dict[str, Any]
    message_type: str | None
    producer: str | None
    trace_id: str | None
    correlation_id: str | None
    causation_id: str | None
    occurred: str | None
    data: bytes

    # Few handlers ask for these, and to make them takes as long as all else here.

    @property
    def occurred_at(self) -> dt.datetime | None:
        """When it happened, as the publisher says; None if it says nothing that can be read."""
        return _time(self.occurred)

    @property
    def envelope(self) -> dict[str, Any]:
        """Every key around the message, known or not, as received."""
        return decode_object(self.data)


def read(
    data: bytes, headers: Mapping[str, str], subject: str, stream: str, sequence: int
) -> Received:
    """Read a message of any of the packages that speak the wire format.

    What is missing or of the wrong type beside the message is None, or taken from the
    headers, the subject or the place in the stream; it is never an error.

    :raises DecodingError: no JSON object, or none with a message in it.
    """
    fields = _usual_fields(data) or _lenient_fields(decode_object(data))
    return Received(
        fields.event_id or _header_id(headers) or f"{stream}:{sequence}",
        fields.topic or topic_of(subject),
        fields.message,
        fields.message_type,
        fields.producer,
        fields.trace_id,
        fields.correlation_id,
        fields.causation_id,
        fields.occurred_at,
        data,
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
    if not is_surely_shallow(data):
        return None
    try:
        fields = _FIELDS.decode(data)
    except (ValueError, RecursionError):  # of which msgspec.DecodeError is one
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
    if value.isspace() or (not value.isprintable() and _CONTROL.search(value)):
        return None
    return value


def _time(text: str | None) -> dt.datetime | None:
    try:
        return None if text is None else parse_timestamp(text)
    except ValueError:
        return None
