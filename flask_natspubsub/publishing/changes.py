"""Publishes model changes as outbox rows, in the flush that writes them.

Only changes through the unit of work are detected: Core statements and bulk updates fire no
model events. Values that an event cannot represent are refused when the model is registered, or
left out, so that they never make the user's commit fail.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm

from ..database.session_events import feeds
from ..errors import ConfigurationError, EncodingError
from ..messages.plain import plain_value
from ..messages.subjects import normalize_topic

_log = logging.getLogger("flask_natspubsub")

#: Columns that are published only if ``fields`` names them.
SECRET = re.compile(
    r"passw|passphrase|pwd|secret|token|credential|(api|access|private|signing|encryption)_?key"
    r"|hash($|_)|(^|_)(hash|hashes|salt|t?otp|pin|ssn|cvv|cvc)($|_)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class ModelChange:
    """A row of a model that was created, updated or deleted."""

    topic: str
    message: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Model:
    """A watched model.

    :param derived: the fields that the database computes.
    """

    cls: type
    topic: str
    fields: tuple[str, ...]
    keys: tuple[str, ...]
    derived: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Before:
    """The state of an object before the flush, which replaces expressions by their values."""

    changed: list[str]
    derived: dict[str, Any]


#: By the state of an object and its model.
_Known = dict[tuple[Any, _Model], _Before]


class ChangeFeed:
    """Watches models and reports what each flush did to them.

    :param report: is called inside the flush with the session and its changes.
    """

    def __init__(self, report: Callable[[orm.Session, Sequence[ModelChange]], None]) -> None:
        self._report = report
        self._models: list[_Model] = []
        self._left_out: set[tuple[type, str]] = set()
        feeds.add(self)

    def watch(self, model: type, topic: str, fields: Iterable[str] | None = None) -> None:
        """Report the changes of a model as ``{topic}.created``, ``.updated``, ``.deleted``.

        :param fields: the columns in the message; default: all except binary ones and those
            whose names look like secrets.
        :raises ConfigurationError: not a mapped class, no such column, or a binary column.
        :raises InvalidTopic: the topic is invalid.
        """
        mapper: Any = sa.inspect(model, raiseerr=False)
        if not isinstance(mapper, orm.Mapper):
            raise ConfigurationError(f"{model!r} is not a mapped class.", "Pass a model.")
        normalize_topic(f"{topic}.created")
        # Not the attributes: related models may not have been imported yet.
        columns: dict[str, Any] = dict(mapper.columns.items())
        chosen = [
            name
            for name, column in columns.items()
            if isinstance(column, sa.Column)
            and not SECRET.search(name)
            and _python_type(column) is not bytes
        ]
        if fields is not None:
            chosen = list(fields)
            for name in chosen:
                _check_column(model, name, columns)
        keys = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
        derived = [name for name in chosen if _is_derived(columns[name])]
        self._models = [one for one in self._models if one.cls is not model]
        self._models.append(_Model(model, topic, tuple(chosen), tuple(keys), tuple(derived)))

    def look_before(self, session: orm.Session) -> None:
        """Record what the flush that begins is going to change."""
        before: _Known = {}
        session.info[self] = before
        for obj in session.dirty:
            for model in self._models:
                if isinstance(obj, model.cls):
                    state: Any = sa.inspect(obj)
                    before[state, model] = _Before(
                        [name for name in model.fields if state.attrs[name].history.has_changes()],
                        _loaded(state, model.derived),
                    )

    def look(self, session: orm.Session) -> None:
        """Report what the flush that ends has changed."""
        before = session.info.pop(self, {})
        changes = [
            change
            for obj, kind in _touched(session, before)
            for change in self._of(session, obj, kind, before)
        ]
        if changes:
            self._report(session, changes)

    def _of(
        self, session: orm.Session, obj: object, kind: str, before: _Known
    ) -> Iterable[ModelChange]:
        for model in self._models:
            if isinstance(obj, model.cls):
                message = _message(session, obj, kind, model, before)
                if message is not None:
                    yield ModelChange(f"{model.topic}.{kind}", self._plain(message, model))

    def _plain(self, message: dict[str, Any], model: _Model) -> dict[str, Any]:
        """Leave out values without a JSON form, which must not make the user's commit fail."""
        plain = {}
        for name, value in message.items():
            try:
                if name in model.keys and isinstance(value, bytes):
                    value = value.hex()
                plain[name] = plain_value(_as_stored(value))
            except EncodingError as error:
                if (model.cls, name) not in self._left_out:
                    self._left_out.add((model.cls, name))
                    _log.error(
                        "%s.%s is left out of %s.*: %s",
                        model.cls.__name__, name, model.topic, error.message,
                    )  # fmt: skip
        return plain


def _check_column(model: type, name: str, columns: dict[str, Any]) -> None:
    if name not in columns:
        raise ConfigurationError(
            f"{model.__name__} has no column {name!r}.",
            f"Its columns: {', '.join(columns)}.",
        )
    # A decorated type may convert its bytes to a string.
    kind = columns[name].type
    by_itself = not isinstance(kind, sa.TypeDecorator) or isinstance(kind, sa.PickleType)
    if by_itself and _python_type(columns[name]) is bytes:
        raise ConfigurationError(
            f"The column {name!r} of {model.__name__} is binary, which an event cannot carry.",
            "Leave it out of fields=, or publish a reference to it, such as a path.",
        )


def _python_type(column: Any) -> type:
    """Return the type that the database returns for a column, or ``object`` if unknown."""
    kind = column.type
    while isinstance(kind, sa.TypeDecorator):
        kind = kind.impl_instance
    try:
        found: type = kind.python_type
    except NotImplementedError:
        return object
    return found


def _is_derived(column: Any) -> bool:
    return not isinstance(column, sa.Column) or column.computed is not None


def _as_stored(value: Any) -> Any:
    """Return the value as the row has it: naive datetimes, and string keys in JSON columns."""
    if isinstance(value, dt.datetime) and value.utcoffset() is None:
        return value.isoformat()
    if isinstance(value, dict):
        return {_key(key): _as_stored(item) for key, item in value.items()}
    return [_as_stored(item) for item in value] if isinstance(value, (list, tuple)) else value


def _key(key: Any) -> Any:
    return json.dumps(key) if key is None or isinstance(key, (bool, int, float)) else key


def _touched(session: orm.Session, before: _Known) -> list[tuple[object, str]]:
    """Return the objects of the flush; changed ones are sorted, as the session has no order."""
    found = [(obj, "created") for obj in session.new]
    expressions = {state for (state, _), one in before.items() if one.changed}
    changed = [
        obj
        for obj in session.dirty
        if session.is_modified(obj) or sa.inspect(obj, raiseerr=True) in expressions
    ]
    found += [(obj, "updated") for obj in sorted(changed, key=_order)]
    found += [(obj, "deleted") for obj in session.deleted]
    return found


def _order(obj: object) -> tuple[str, list[tuple[int, str]]]:
    """Return a key that sorts by class and primary key, numbers by their value."""
    identity: tuple[Any, ...] = sa.inspect(obj, raiseerr=True).identity or ()
    return type(obj).__name__, [(len(str(part)), str(part)) for part in identity]


def _message(
    session: orm.Session, obj: object, kind: str, model: _Model, known: _Known
) -> dict[str, Any] | None:
    state: Any = sa.inspect(obj)
    if kind == "created":
        # A field that was never set is NULL, unless the database has made a value for it.
        made = [*state.expired_attributes, *model.derived]
        values = {name: None for name in model.fields if name not in made}
        return values | _loaded(state, model.fields) | _fetched(session, state, model, made)
    values = dict(zip(model.keys, state.identity, strict=True)) | _loaded(state, model.fields)
    if kind == "deleted":
        return values
    before = known.get((state, model), _Before([], {}))
    values |= _fetched(session, state, model, [*before.changed, *model.derived])
    missing = object()
    changed = [
        name
        for name in model.fields
        if name in before.changed
        or (name in model.derived and before.derived.get(name, missing) != values.get(name))
    ]
    return values | {"changed": changed} if changed else None


def _loaded(state: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Return loaded values only: reading an expired attribute would query inside the flush."""
    return {name: state.dict[name] for name in names if name in state.dict}


def _fetched(
    session: orm.Session, state: Any, model: _Model, names: Iterable[str]
) -> dict[str, Any]:
    """Query the values of expressions and computed columns of this flush."""
    missing = [name for name in model.fields if name in names and name not in state.dict]
    if not missing:
        return {}
    identity = state.identity or state.mapper.primary_key_from_instance(state.obj())
    query = sa.select(*(getattr(model.cls, name) for name in missing)).where(
        *(getattr(model.cls, key) == value for key, value in zip(model.keys, identity, strict=True))
    )
    row = session.execute(query).first()
    return {} if row is None else dict(zip(missing, row, strict=True))
