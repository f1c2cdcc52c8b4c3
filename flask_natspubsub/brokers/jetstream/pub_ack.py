"""What a stream answers to a publish: an acknowledgement, or why not."""

from __future__ import annotations

import msgspec

from ...errors import PayloadTooLarge, PublishDenied, PublishError
from ..base import StoredAck

STREAM_MESSAGE_TOO_LARGE = 10054


class _Refusal(msgspec.Struct):
    error: dict[str, object]


_decode_ack = msgspec.json.Decoder(StoredAck).decode


def too_large(subject: str, size: int, limit: int) -> PayloadTooLarge:
    """Make the error for a message that is larger than the server takes."""
    return PayloadTooLarge(
        f"The message for {subject!r} has {size:,} bytes with its headers; "
        f"the server takes {limit:,}.",
        "Publish a reference to the data instead, or raise max_payload on the server.",
        size=size,
        limit=limit,
    )


def result_of(data: bytes, subject: str, size: int) -> StoredAck | PublishError:
    """Read the answer to the publish of ``size`` bytes to ``subject``."""
    try:
        ack = _decode_ack(data)
        if ack.sequence:
            return ack
    except msgspec.MsgspecError:
        pass
    return _why_not(data, subject, size)


def _why_not(data: bytes, subject: str, size: int) -> PublishError:
    try:
        error = msgspec.json.decode(data, type=_Refusal).error
    except msgspec.MsgspecError:
        return PublishError(
            f"Something other than JetStream answered on {subject!r}.",
            "Another service replies to this subject; it should not.",
            outcome="unknown",
        )
    text = f"The stream refused the message: {error.get('description', error)}."
    if error.get("err_code") == STREAM_MESSAGE_TOO_LARGE:
        return PayloadTooLarge(text, "Raise max_msg_size of the stream.", size=size)
    if error.get("code") == 503:
        return PublishError(text, "The stream may be full, or without a leader; try again later.")
    return PublishDenied(text, "Compare the stream's settings with what is published.")
