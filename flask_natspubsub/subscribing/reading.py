"""How a subscriber's message is read: out of its envelope, or as another system wrote it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..brokers.base import Delivery
from ..errors import DeadLetter, DecodingError, Discard, Retry
from ..messages.codec import decode_value
from ..messages.received import Received, read, read_plain
from .retry import error_text

#: Makes of a delivery what was received; DecodingError if it cannot be read.
Read = Callable[[Delivery], Received]
#: Makes the message of the bytes, or of the bytes and the headers.
Decoder = Callable[..., Any]


def reader(envelope: bool | Decoder | None, *, is_foreign: bool, annotation: Any) -> Read:
    """Return what reads a subscriber's messages.

    :param envelope: the option, as declared.
    :param is_foreign: whether the messages come from outside the environment's subjects; then,
        unless the option says, what has no envelope is read as it is.
    :param annotation: of the message in the handler.
    """
    if envelope is True or (envelope is None and not is_foreign):
        return read
    decode = _decoder(annotation) if isinstance(envelope, bool | None) else _guarded(envelope)

    def as_it_is(delivery: Delivery) -> Received:
        return read_plain(decode(delivery.data, delivery.headers), delivery)

    def either(delivery: Delivery) -> Received:
        try:
            return read(delivery)
        except DecodingError:
            return as_it_is(delivery)

    return either if envelope is None else as_it_is


def try_read(read_one: Read, delivery: Delivery) -> Received | None:
    """Read, with None for what cannot be read."""
    try:
        return read_one(delivery)
    except Exception:  # noqa: BLE001 - a decoder is the user's code
        return None


def _decoder(annotation: Any) -> Callable[[bytes, Mapping[str, str]], Any]:
    if annotation is bytes:
        return lambda data, headers: data
    takes_bytes = annotation in (Any, object)

    def decode(data: bytes, headers: Mapping[str, str]) -> Any:
        try:
            return decode_value(data)
        except DecodingError:
            if takes_bytes:
                return data
            raise

    return decode


def _guarded(decoder: Decoder) -> Callable[[bytes, Mapping[str, str]], Any]:
    """Return a decoder whose errors say that the message cannot be read."""
    takes_headers = _takes_two(decoder)

    def decode(data: bytes, headers: Mapping[str, str]) -> Any:
        try:
            return decoder(data, headers) if takes_headers else decoder(data)
        except (DecodingError, Retry, Discard, DeadLetter):
            raise
        except Exception as error:
            raise DecodingError(f"The decoder failed: {error_text(error)}") from error

    return decode


def _takes_two(decoder: Decoder) -> bool:
    try:
        inspect.signature(decoder).bind(b"", {})
    except TypeError:
        return False
    except ValueError:  # a builtin that does not say
        return False
    return True
