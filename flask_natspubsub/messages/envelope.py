"""The JSON object around each message, and the headers beside it.

``Envelope`` is what is sent, in the order and form the wire format asks for; what others have
sent is read in ``received``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from ..errors import EncodingError
from ..text import one_line

#: Longest event id, trace id or other identifier, in characters.
MAX_IDENTIFIER_LENGTH = 255

SCHEMA_VERSION = 1

_OWN_HEADERS = frozenset({"topic", "trace_id", "traceparent"})
# Compiled when first used, as in ``subjects``.
_HEADER_NAME = r"[!-9;-~]+"  # printable ASCII without space and colon
_IDENTIFIER = rf"[!-~]{{1,{MAX_IDENTIFIER_LENGTH}}}"
#: With the separators of lines and paragraphs, and what turns the direction of a text round.
CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
#: W3C Trace Context level 1, https://www.w3.org/TR/trace-context/; its first group is the trace id.
TRACEPARENT = r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_ENCODER = msgspec.json.Encoder()


class Lineage(msgspec.Struct, frozen=True, gc=False):
    """Ids that a published message inherits unless its publisher gives others."""

    trace_id: str | None = None
    correlation_id: str | None = None
    causation_id: str | None = None
    traceparent: str | None = None


class Envelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One message to be sent.

    :param topic: as the caller wrote it, not normalised.
    :param occurred_at: as ``ids.format_timestamp`` writes it.
    :param schema_version: ``SCHEMA_VERSION``.
    :param message: in plain form, see ``plain.plain_object``; ``resource_id`` too.
    """

    # The fields are in the order of the wire: the encoder keeps it, and leaves out what is None.
    event_id: str
    schema_version: int
    topic: str
    message_type: str | None = None
    producer: str
    occurred_at: str
    trace_id: str | None = None
    message: dict[str, Any]
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
    headers = {"topic": topic if topic.isprintable() else re.sub(CONTROL, "_", topic)}
    if envelope.trace_id is not None:
        headers["trace_id"] = envelope.trace_id
    headers["Nats-Msg-Id"] = envelope.event_id
    if traceparent is not None:
        headers["traceparent"] = traceparent
    if extra:
        check_headers(extra)
        headers.update(extra.items())
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
        values = headers.getlist(name) if hasattr(headers, "getlist") else ()  # Werkzeug's
        if len(values) > 1:
            raise EncodingError(
                f"The header {name!r:.80} is given {len(values)} times, and would be sent once.",
                "Give one value, such as all of them joined by commas.",
                path=f"headers.{name:.80}",
            )
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
    if not isinstance(name, str) or not re.fullmatch(_HEADER_NAME, name):
        problem, fix = "cannot be sent", "Use printable ASCII without spaces and ':'."
    elif name.lower().startswith("nats-") or name.lower() in _OWN_HEADERS:
        problem, fix = "is not free: NATS or the extension sets it", "Use another name."
    else:
        return
    raise EncodingError(
        f"The header name {name!r:.80} {problem}.", fix, path=f"headers.{one_line(name)}"
    )


def _is_one_line(value: object) -> bool:
    return isinstance(value, str) and (value.isprintable() or not re.search(CONTROL, value))


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


def check_traceparent(value: object) -> str:
    """Return ``value`` if it is a W3C trace context.

    :raises EncodingError: it is none.
    """
    if not isinstance(value, str) or not re.fullmatch(TRACEPARENT, value):
        raise EncodingError(
            f"{value!r:.80} is not a W3C trace context.",
            "It looks like '00-<32 hex digits>-<16 hex digits>-01'.",
            path="traceparent",
        )
    return value


def _is_identifier(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(_IDENTIFIER, value) is not None


def resource_id_of(message: Mapping[str, Any]) -> Any:
    """Return the ``resource_id`` of an event: the message's ``id`` or ``ID``; None without."""
    return message.get("id") or message.get("ID") or None
