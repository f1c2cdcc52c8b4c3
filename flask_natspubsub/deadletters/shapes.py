"""The formats of dead letters: our own, and those of the JavaScript and Ruby packages."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from ..errors import DecodingError
from ..messages.codec import decode_object, encode_value
from ..messages.message import StoredMessage
from .replays import number

BODY_OMITTED = "x-dlq-body-omitted"


def values_of(stored: StoredMessage) -> dict[str, Any]:
    """Read the fields of a dead letter, whichever package wrote it.

    :returns: ``shape``, the original ``data``, and the fields found; their types are not checked.
    """
    headers = {name.lower(): value for name, value in stored.headers.items()}
    if "x-dlq-context" in headers:
        return _ruby_values(headers["x-dlq-context"], stored.data)
    if "x-original-subject" not in headers:
        script = _javascript_values(stored.data)
        if script is not None:
            return script
    return {
        "shape": "python",
        "data": stored.data,
        "subscriber": headers.get("x-subscriber"),
        "reason": headers.get("x-dlq-reason"),
        "error": headers.get("x-dlq-error"),
        "traceback": headers.get("x-dlq-traceback"),
        "deliveries": number(headers.get("x-deliveries")),
        "event_id": headers.get("x-event-id"),
        "trace_id": headers.get("x-trace-id"),
        "original_subject": headers.get("x-original-subject"),
        "original_stream": headers.get("x-original-stream"),
        "original_sequence": headers.get("x-original-sequence"),
        "at": headers.get("x-dead-lettered-at"),
    }


def _ruby_values(context: str, data: bytes) -> dict[str, Any]:
    """Read the Ruby package's format: the original body, and a header with a JSON object."""
    try:
        values = decode_object(context.encode())
    except DecodingError:
        values = {}
    return _common(values) | {"shape": "ruby", "data": data}


def _javascript_values(data: bytes) -> dict[str, Any] | None:
    """Read the JavaScript package's format: a new JSON object around the original."""
    try:
        values = decode_object(data)
        if "original_subject" not in values:
            return None
        if values.get("raw_base64") is not None:
            raw = base64.b64decode(values["raw_base64"], validate=True)
        else:
            raw = encode_value(values.get("payload"))
    except (DecodingError, TypeError, ValueError):
        return None
    return _common(values) | {"shape": "javascript", "data": raw}


def _common(values: Mapping[str, Any]) -> dict[str, Any]:
    error = [values.get(key) for key in ("error", "error_class", "error_message")]
    return {
        "subscriber": values.get("subscriber") or values.get("consumer"),
        "reason": values.get("reason"),
        "error": ": ".join(str(part) for part in error if part),
        "deliveries": number(values.get("deliveries")),
        "event_id": values.get("event_id"),
        "trace_id": values.get("trace_id"),
        "original_subject": values.get("original_subject"),
        "original_stream": values.get("stream"),
        "original_sequence": values.get("stream_sequence") or values.get("sequence"),
        "at": values.get("published_at") or values.get("occurred_at") or values.get("timestamp"),
    }
