"""Converts messages to plain dicts, lists and scalars.

msgspec alone would write NaN as null, bytes as base64 and a datetime without a time zone as if
it had one. This module therefore converts a message first, and refuses values that JSON cannot
represent without loss, with their path.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import math
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from decimal import Decimal
from typing import Any

import msgspec

from ..errors import EncodingError
from ..text import one_line

#: Maximum nesting of objects and arrays in an envelope; a message may have one level less.
MAX_DEPTH = 100

_DEEPEST_MESSAGE = MAX_DEPTH - 1
_INTEGER_LIMIT = 10**1000
_SMALL = 2**63
_PLAIN_KEY = r"[A-Za-z_][A-Za-z0-9_-]*"

Converter = Callable[[Any, int], Any]


def message_type_of(message: object) -> str | None:
    """Return the class name of a typed message; None for a dict or another mapping."""
    # The first check costs a tenth of the second, and most messages are dicts.
    if type(message) is dict or isinstance(message, Mapping):
        return None
    return type(message).__name__


def plain_object(message: object) -> dict[str, Any]:
    """Return a message that consists of dicts, lists, strings, numbers, booleans and None only.

    :param message: a mapping, dataclass, msgspec Struct or pydantic model.
    :raises EncodingError: the message or a part of it has no JSON form; see its ``path``.
    """
    kind = type(message)
    try:
        plain = (_CONVERTERS.get(kind) or _converter_of(kind))(message, 0)
    except _NoJsonForm as error:
        raise error.as_encoding_error() from None
    if type(plain) is not dict:
        raise EncodingError(
            f"A message is a JSON object; this {kind.__name__} is none.",
            "Publish a dict, dataclass, msgspec Struct or pydantic model.",
        )
    return plain


def plain_value(value: object) -> Any:
    """Return a part of a message in the same form.

    :raises EncodingError: the value has no JSON form.
    """
    try:
        return _plain(value, 1)
    except _NoJsonForm as error:
        raise error.as_encoding_error() from None


def step(key: object) -> str:
    """Return one step of a path, such as ``.price`` or ``[2]``."""
    if isinstance(key, int):
        return f"[{key}]"
    text = str(key)
    return f".{text}" if re.fullmatch(_PLAIN_KEY, text) else f"[{text!r:.80}]"


class _NoJsonForm(Exception):
    """A value has no JSON form. Its path is completed while the exception is passed up."""

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix
        self.path = ""

    def inside(self, step: str) -> None:
        self.path = step + self.path

    def as_encoding_error(self) -> EncodingError:
        path = "$" + (self.path if len(self.path) <= 200 else self.path[:200] + "...")
        return EncodingError(f"The value at {path} {self.problem}.", self.fix, path=path)


def _plain(value: Any, depth: int) -> Any:
    kind = type(value)
    return (_CONVERTERS.get(kind) or _converter_of(kind))(value, depth)


def _object(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    if depth >= _DEEPEST_MESSAGE:
        raise _too_deep()
    plain = {}
    for key, item in value.items():
        name = key if type(key) is str and key.isascii() else _key(key)
        kind = type(item)
        # The most frequent types need no call.
        if (kind is str and item.isascii()) or (kind is int and -_SMALL < item < _SMALL):
            plain[name] = item
            continue
        try:
            plain[name] = (_CONVERTERS.get(kind) or _converter_of(kind))(item, depth + 1)
        except _NoJsonForm as error:
            error.inside(step(name))
            raise
    return plain


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise _NoJsonForm(f"has the key {key!r:.80}, which is not a string", "Use str(key).")
    return _text(key)


def _array(value: Iterable[Any], depth: int) -> list[Any]:
    if depth >= _DEEPEST_MESSAGE:
        raise _too_deep()
    plain: list[Any] = []
    for item in value:
        try:
            plain.append(_plain(item, depth + 1))
        except _NoJsonForm as error:
            error.inside(f"[{len(plain)}]")
            raise
    return plain


def _set(value: Collection[Any], depth: int) -> list[Any]:
    try:
        members = sorted(value)
    except TypeError:
        raise _NoJsonForm("is a set whose members have no order", "Use a list.") from None
    return _array(members, depth)


def _too_deep() -> _NoJsonForm:
    return _NoJsonForm(
        f"is nested deeper than {_DEEPEST_MESSAGE} levels, or contains itself",
        "Send a flatter message.",
    )


def _as_is(value: Any, _depth: int) -> Any:
    return value


def _text(value: str, _depth: int = 0) -> str:
    text = str.__str__(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _NoJsonForm("has half of a surrogate pair, which is not Unicode text") from None
    return text


def _integer(value: int, _depth: int) -> int:
    if not -_INTEGER_LIMIT < value < _INTEGER_LIMIT:
        raise _NoJsonForm("has more than 1000 digits", "Send it as text.")
    return int(value)


def _float(value: float, _depth: int) -> float:
    if not math.isfinite(value):
        raise _NoJsonForm(f"is {float(value)}, which JSON cannot carry", "Send None or a text.")
    return float(value)


def _decimal(value: Decimal, _depth: int) -> str:
    if not value.is_finite():
        raise _NoJsonForm(f"is {value}, which JSON cannot carry", "Send None or a text.")
    return str(value)


def _datetime(value: dt.datetime, _depth: int) -> str:
    if value.utcoffset() is None:
        raise _NoJsonForm(
            "is a datetime without a time zone", "Use one such as datetime.now(timezone.utc)."
        )
    try:
        return value.astimezone(dt.UTC).isoformat().removesuffix("+00:00") + "Z"
    except OverflowError:
        raise _NoJsonForm("is a datetime out of range in UTC") from None


def _iso(value: dt.date | dt.time, _depth: int) -> str:
    return value.isoformat()


def _duration(value: dt.timedelta, _depth: int) -> Any:
    return msgspec.to_builtins(value)


def _string_of(value: object, _depth: int) -> str:
    return str(value)


def _enum(value: enum.Enum, depth: int) -> Any:
    return _plain(value.value, depth)


def _refused_bytes(_value: object, _depth: int) -> Any:
    raise _NoJsonForm("is bytes, which JSON cannot carry", "Send text, such as base64.")


def _no_json_form(value: object, _depth: int) -> Any:
    raise _NoJsonForm(
        f"is a {type(value).__name__}, which has no JSON form",
        "Use a dict, list, str, number, bool, None, datetime, date, UUID, Enum, Decimal, "
        "dataclass, msgspec Struct or pydantic model.",
    )


def _dataclass(value: Any, depth: int) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(value)]
    return _object({name: getattr(value, name) for name in names if hasattr(value, name)}, depth)


def _struct(value: msgspec.Struct, depth: int) -> Any:
    """Convert a Struct according to its options: renaming, tags, omitted defaults, arrays."""
    config = value.__struct_config__
    fields = value.__struct_fields__
    items = [getattr(value, name) for name in fields]
    if config.array_like:
        return _array(items if config.tag is None else [config.tag, *items], depth)
    defaults = (msgspec.NODEFAULT,) * len(fields) + value.__struct_defaults__
    tag = {} if config.tag is None else {config.tag_field: config.tag}
    pairs = zip(value.__struct_encode_fields__, items, defaults[-len(fields) :], strict=True)
    return _object(
        tag
        | {
            name: item
            for name, item, default in pairs
            if item is not msgspec.UNSET
            and not (config.omit_defaults and _is_default(item, default))
        },
        depth,
    )


def _is_default(item: object, default: object) -> bool:
    """Whether msgspec would omit ``item``: it is the default, or an empty default collection."""
    factory = getattr(default, "factory", None)
    if factory in (list, dict, set):
        return type(item) is factory and not item
    return item is default


def _model(value: Any, depth: int) -> Any:
    _refuse_rows_in(value, depth)
    try:
        dumped = value.model_dump(mode="json", by_alias=True)
        native = value.model_dump(by_alias=True)
    except (ValueError, TypeError, RecursionError) as error:
        raise _NoJsonForm(f"is a model that cannot be dumped ({one_line(error)})") from error
    return _plain(_with_datetimes(dumped, native), depth)


def _refuse_rows_in(value: Any, depth: int) -> None:
    """Refuse database models in a pydantic model, which would dump those that are dataclasses."""
    if depth >= _DEEPEST_MESSAGE:
        raise _too_deep()
    if hasattr(type(value), "_sa_class_manager"):
        _refused_row(value, depth)
    elif isinstance(value, dict):
        _refuse_rows_in_all(value.items(), depth)
    elif isinstance(value, (list, tuple, set, frozenset)):
        _refuse_rows_in_all(enumerate(value), depth)
    elif hasattr(value, "model_dump") or dataclasses.is_dataclass(value):
        fields = getattr(type(value), "model_fields", {})
        hidden = {name for name, field in fields.items() if field.exclude}
        found = getattr(value, "__dict__", {}).items()
        _refuse_rows_in_all([(name, item) for name, item in found if name not in hidden], depth)


def _refuse_rows_in_all(items: Iterable[tuple[Any, Any]], depth: int) -> None:
    for key, item in items:
        try:
            _refuse_rows_in(item, depth + 1)
        except _NoJsonForm as error:
            error.inside(step(key))
            raise


def _with_datetimes(dumped: Any, native: Any) -> Any:
    """Restore the datetimes in a pydantic dump, so that naive ones are refused."""
    if isinstance(dumped, dict) and isinstance(native, dict) and len(dumped) == len(native):
        pairs = zip(dumped.items(), native.values(), strict=True)
        return {key: _with_datetimes(item, original) for (key, item), original in pairs}
    if isinstance(dumped, list) and isinstance(native, (list, tuple)):
        if len(dumped) == len(native):
            return [_with_datetimes(*pair) for pair in zip(dumped, native, strict=True)]
    elif isinstance(native, dt.datetime) and _is_iso_of(dumped, native):
        return native
    return dumped


def _is_iso_of(dumped: object, native: dt.datetime) -> bool:
    """Whether the dump is pydantic's own, and not the format of a custom serializer."""
    try:
        return isinstance(dumped, str) and dt.datetime.fromisoformat(dumped) == native
    except ValueError:
        return False


def _refused_row(value: object, _depth: int) -> Any:
    raise _NoJsonForm(
        f"is a {type(value).__name__}, a database model: all its columns would be sent, secrets "
        "too",
        "Pass the fields that are wanted, such as {'id': user.id}.",
    )


def _multiple(value: Any, depth: int) -> dict[str, Any]:
    """Convert a form or query string; a field that occurs more than once becomes a list."""
    found = {name: value.getlist(name) for name in dict.fromkeys(key for key, _ in value.items())}
    return _object(
        {name: items[0] if len(items) == 1 else items for name, items in found.items()}, depth
    )


def _converter_of(kind: type) -> Converter:
    """Return the converter of a type that is not in the table."""
    if hasattr(kind, "_sa_class_manager"):  # mapped by SQLAlchemy, even if it is also a dataclass
        return _refused_row
    if hasattr(kind, "getlist") and hasattr(kind, "items"):  # a MultiDict of Werkzeug
        return _multiple
    if hasattr(kind, "model_dump"):
        return _model
    for base, converter in _BASES:
        if issubclass(kind, base):
            return converter
    return _dataclass if dataclasses.is_dataclass(kind) else _no_json_form


_CONVERTERS: dict[type, Converter] = {
    dict: _object,
    list: _array,
    tuple: _array,
    str: _text,
    int: _integer,
    float: _float,
    bool: _as_is,
    type(None): _as_is,
    dt.datetime: _datetime,
    dt.date: _iso,
    uuid.UUID: _string_of,
    Decimal: _decimal,
}

# The order matters: an Enum may also be a str, and a datetime is a date.
_BASES: tuple[tuple[Any, Converter], ...] = (
    (enum.Enum, _enum),
    (msgspec.Struct, _struct),
    (str, _text),
    (int, _integer),
    (float, _float),
    (Decimal, _decimal),
    (dt.datetime, _datetime),
    ((dt.date, dt.time), _iso),
    (dt.timedelta, _duration),
    (uuid.UUID, _string_of),
    ((bytes, bytearray, memoryview), _refused_bytes),
    (Mapping, _object),
    ((list, tuple), _array),
    ((set, frozenset), _set),
)
