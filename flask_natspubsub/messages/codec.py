"""Encodes messages as JSON and decodes them.

Encoding uses ``plain``, which refuses values that JSON cannot represent without loss. Decoding
accepts any JSON object, and converts it to the handler's type.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import msgspec
import msgspec.inspect

from ..errors import DecodingError, RegistrationError
from ..text import one_line
from .plain import MAX_DEPTH, step

_ENCODER = msgspec.json.Encoder()


def encode_value(value: object) -> bytes:
    """Encode a value that is not a message, such as a request to the server, with msgspec.

    :raises TypeError: a part of the value has no JSON form.
    """
    return _ENCODER.encode(value)


def decode_value(data: bytes | str) -> Any:
    """Decode JSON of any type.

    :raises DecodingError: not JSON, not UTF-8, or nested too deeply to be decoded.
    """
    try:
        return msgspec.json.decode(data)
    except RecursionError:
        raise DecodingError("The JSON is nested too deeply.") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise DecodingError(f"The data is not valid JSON: {one_line(error)}.") from None


def decode_object(data: bytes) -> dict[str, Any]:
    """Decode a JSON object. If a key occurs twice, its last value is used.

    :raises DecodingError: not UTF-8, not JSON, not an object, or nested deeper than
        ``MAX_DEPTH`` levels; its reason is ``"malformed"``.
    """
    value = decode_value(data)
    if type(value) is not dict:
        raise DecodingError(f"The data is not a JSON object but {_json_kind(value)}.")
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH and _is_too_deep(value):
        raise DecodingError(f"The JSON is nested deeper than {MAX_DEPTH} levels.")
    return value


def build_decoder(annotation: Any, *, plain: bool = False) -> Callable[[Any], Any]:
    """Return a function that converts a decoded message to the handler's type.

    The function raises ``DecodingError`` (reason ``"schema"``) if the message does not fit the
    type. Without a type, and for ``dict``, ``Mapping`` and ``Any``, it returns the message
    unchanged.

    :param annotation: the annotation of the handler's first parameter, with names resolved.
    :param plain: whether messages may be bytes, or JSON that is not an object.
    :raises RegistrationError: messages cannot be decoded into this type.
    """
    if annotation in (inspect.Parameter.empty, Any, object) or (plain and annotation is bytes):
        return as_received
    kind = typing.get_origin(annotation) or annotation
    if not isinstance(kind, type):
        raise _unsupported(annotation)
    if kind in (dict, Mapping, MutableMapping):
        return as_received
    if hasattr(kind, "model_validate_json"):
        return _pydantic_decoder(kind)
    if issubclass(kind, msgspec.Struct) or dataclasses.is_dataclass(kind):
        return _msgspec_decoder(annotation)
    if typing.is_typeddict(kind) or (plain and kind in _PLAIN_TYPES):
        return _msgspec_decoder(annotation)
    raise _unsupported(annotation)


#: Types of JSON values other than objects.
_PLAIN_TYPES = (list, tuple, set, frozenset, str, int, float, bool)


def as_received(message: Any) -> Any:
    """Return the message unchanged, for a handler without an annotation."""
    return message


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (item.values() if type(item) is dict else item for item in level)
        level = [item for items in inner for item in items if type(item) in (dict, list)]
        if not level:
            return False
    return True


def _json_kind(value: object) -> str:
    kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _pydantic_decoder(model: Any) -> Callable[[Any], Any]:
    try:
        model.model_rebuild()
    except Exception as error:
        raise _unsupported(model, str(error)) from error

    def decode(message: Any) -> Any:
        try:
            # As JSON, so that a strict model accepts the string of a datetime or UUID.
            return model.model_validate_json(_ENCODER.encode(message))
        except (ValueError, TypeError) as error:
            raise _does_not_fit(model, _pydantic_cause(error)) from None

    return decode


def _pydantic_cause(error: Exception) -> str:
    if not hasattr(error, "errors"):
        return str(error)
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{first['msg']} - at `${''.join(step(part) for part in first['loc'])}`"


def _msgspec_decoder(annotation: Any) -> Callable[[Any], Any]:
    try:
        msgspec.json.Decoder(annotation)
        info = msgspec.inspect.type_info(annotation)
    except Exception as error:
        raise _unsupported(annotation, str(error)) from error
    if getattr(info, "array_like", False):
        raise _unsupported(annotation, "it is array_like, and a message is an object")
    for custom in _custom_types(info, set()):
        raise _unsupported(annotation, f"it has a field of the type {custom!r}")

    def decode(message: Any) -> Any:
        try:
            return msgspec.convert(message, annotation, str_keys=True)
        except (msgspec.ValidationError, ValueError, TypeError) as error:
            raise _does_not_fit(annotation, str(error)) from None

    return decode


def _custom_types(info: Any, seen: set[int]) -> Iterator[type]:
    """Yield types that msgspec does not support; it would raise only when decoding."""
    if id(info) in seen:
        return
    seen.add(id(info))
    if isinstance(info, msgspec.inspect.CustomType):
        yield info.cls
    for name in info.__struct_fields__:
        part = getattr(info, name)
        for child in part if isinstance(part, tuple) else (part,):
            if isinstance(child, (msgspec.inspect.Type, msgspec.inspect.Field)):
                yield from _custom_types(child, seen)


def _unsupported(annotation: Any, cause: str = "") -> RegistrationError:
    because = f": {one_line(cause)}" if cause else ""
    return RegistrationError(
        f"Messages cannot be decoded into {_name(annotation)}{because}.",
        "Annotate the handler's message with dict, a dataclass, msgspec Struct, TypedDict or "
        "pydantic model, whose fields are of JSON types, datetime, UUID, Decimal or Enum.",
    )


def _does_not_fit(annotation: Any, cause: str) -> DecodingError:
    return DecodingError(
        f"The message does not fit {_name(annotation)}: {one_line(cause)}.", reason="schema"
    )


def _name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else repr(annotation)
