"""Model changes become outbox rows, in the flush that writes them.

Only what goes through the unit of work is seen: Core statements and bulk updates fire no
model events, so a row changed by them publishes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import sqlalchemy as sa
from sqlalchemy import event, orm

from ..errors import ConfigurationError

#: Columns that are not published unless they are named.
SECRET = re.compile(
    r"passw|passphrase|pwd|secret|token|credential|(api|access|private|signing|encryption)_?key"
    r"|hash($|_)|(^|_)(hash|hashes|salt|t?otp|pin|ssn|cvv|cvc)($|_)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Change:
    """A row of a model that was created, updated or deleted."""

    topic: str
    message: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Model:
    cls: type
    topic: str
    fields: tuple[str, ...]
    keys: tuple[str, ...]


class ChangeFeed:
    """Watches models and reports what each flush did to them.

    :param report: called inside the flush with the session and its changes.
    """

    def __init__(self, report: Callable[[orm.Session, Sequence[Change]], None]) -> None:
        self._report = report
        self._models: list[_Model] = []
        _feeds.add(self)

    def watch(self, model: type, topic: str, fields: Iterable[str] | None = None) -> None:
        """Report the changes of a model as ``{topic}.created``, ``.updated``, ``.deleted``.

        :param fields: the columns in the message; default: all but those that look like
            secrets.
        :raises ConfigurationError: not a mapped class, or no such column.
        """
        mapper: Any = sa.inspect(model, raiseerr=False)
        if not isinstance(mapper, orm.Mapper):
            raise ConfigurationError(f"{model!r} is not a mapped class.", "Pass a model.")
        columns = [attribute.key for attribute in mapper.column_attrs]
        chosen = [name for name in columns if not SECRET.search(name)]
        if fields is not None:
            chosen = list(fields)
            for name in chosen:
                if name not in columns:
                    raise ConfigurationError(
                        f"{model.__name__} has no column {name!r}.",
                        f"Its columns: {', '.join(columns)}.",
                    )
        keys = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
        self._models = [one for one in self._models if one.cls is not model]
        self._models.append(_Model(model, topic, tuple(chosen), tuple(keys)))

    def look(self, session: orm.Session) -> None:
        """Report what the flush that is ending has done."""
        changes = [change for obj, kind in _touched(session) for change in self._of(obj, kind)]
        if changes:
            self._report(session, changes)

    def _of(self, obj: object, kind: str) -> Iterable[Change]:
        for model in self._models:
            if isinstance(obj, model.cls):
                message = _message(obj, kind, model)
                if message is not None:
                    yield Change(f"{model.topic}.{kind}", message)


#: All that there are: a listener cannot be taken away, and must not keep an extension alive.
_feeds: WeakSet[ChangeFeed] = WeakSet()


@event.listens_for(orm.Session, "after_flush")
def _after_flush(session: orm.Session, context: object) -> None:
    for feed in list(_feeds):
        feed.look(session)


def _touched(session: orm.Session) -> list[tuple[object, str]]:
    """Return the objects of the flush; the session keeps the changed ones in no order."""
    found = [(obj, "created") for obj in session.new]
    changed = [obj for obj in session.dirty if session.is_modified(obj)]
    found += [(obj, "updated") for obj in sorted(changed, key=_order)]
    found += [(obj, "deleted") for obj in session.deleted]
    return found


def _order(obj: object) -> tuple[str, list[tuple[int, str]]]:
    """Sort by class and primary key, numbers as numbers."""
    identity: tuple[Any, ...] = sa.inspect(obj, raiseerr=True).identity or ()
    return type(obj).__name__, [(len(str(part)), str(part)) for part in identity]


def _message(obj: object, kind: str, model: _Model) -> dict[str, Any] | None:
    state: Any = sa.inspect(obj)
    if kind == "created":
        # What was never set is NULL, unless the database has made a value nobody has read yet.
        return {name: None for name in model.fields if name not in state.expired_attributes} | (
            _loaded(state, model.fields)
        )
    keys = dict(zip(model.keys, state.identity, strict=True))
    values = keys | _loaded(state, model.fields)
    if kind == "deleted":
        return values
    changed = [name for name in model.fields if state.attrs[name].history.has_changes()]
    return values | {"changed": changed} if changed else None


def _loaded(state: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the values there are: reading an expired attribute would query inside the flush."""
    return {name: state.dict[name] for name in names if name in state.dict}
