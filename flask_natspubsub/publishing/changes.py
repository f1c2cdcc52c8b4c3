"""Model changes become outbox rows, in the flush that writes them.

Only what goes through the unit of work is seen: Core statements and bulk updates fire no
model events, so a row changed by them publishes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, orm

from ..errors import ConfigurationError

#: Columns that are not published unless they are named.
SECRET = re.compile(
    r"(^|_)(password|passwd|pwd|passphrase|secret|token|hash|salt|otp|pin|ssn|cvv)(s|$|_)"
    r"|api_?key|private_?key|credential",
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
        if not self._models:
            event.listen(orm.Session, "after_flush", self._after_flush)
        self._models = [one for one in self._models if one.cls is not model]
        self._models.append(_Model(model, topic, tuple(chosen), tuple(keys)))

    def _after_flush(self, session: orm.Session, context: object) -> None:
        changes = [change for obj, kind in _touched(session) for change in self._of(obj, kind)]
        if changes:
            self._report(session, changes)

    def _of(self, obj: object, kind: str) -> Iterable[Change]:
        for model in self._models:
            if isinstance(obj, model.cls):
                message = _message(obj, kind, model)
                if message is not None:
                    yield Change(f"{model.topic}.{kind}", message)


def _touched(session: orm.Session) -> list[tuple[object, str]]:
    """Return the objects of the flush; the sets of the session have no order, so by key."""
    found = [(obj, "created") for obj in session.new]
    found += [(obj, "updated") for obj in session.dirty if session.is_modified(obj)]
    found += [(obj, "deleted") for obj in session.deleted]
    return found


def _message(obj: object, kind: str, model: _Model) -> dict[str, Any] | None:
    if kind == "deleted":
        return _values(obj, tuple(dict.fromkeys((*model.keys, *model.fields))))
    if kind == "created":
        return _values(obj, model.fields)
    state: Any = sa.inspect(obj)
    changed = [name for name in model.fields if state.attrs[name].history.has_changes()]
    if not changed:
        return None
    names = tuple(dict.fromkeys((*model.keys, *model.fields)))
    return _values(obj, names) | {"changed": changed}


def _values(obj: object, names: tuple[str, ...]) -> dict[str, Any]:
    """Read what is loaded: reading an expired attribute would query inside the flush."""
    loaded: dict[str, Any] = sa.inspect(obj).dict
    return {name: loaded[name] for name in names if name in loaded}
