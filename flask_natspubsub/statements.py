"""Statements that run so often that to put them together would cost more than to run them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa


class Statement:
    """A statement compiled once for each kind of database.

    SQLAlchemy looks a statement up in its cache by walking through all of it, each time it is
    executed: for the relay's query that takes ten times as long as the query.

    :param clause: with a ``bindparam`` for each value that ``execute`` is to be given; numbers
        and text only, since values and rows go past SQLAlchemy's types.
    """

    def __init__(self, clause: sa.Executable) -> None:
        self._clause: Any = clause
        self._compiled: dict[str, tuple[str, Any]] = {}

    def execute(self, connection: sa.Connection, **values: Any) -> sa.CursorResult[Any]:
        """Execute it; the rows have the names of the columns."""
        dialect = connection.dialect
        known = self._compiled.get(dialect.name)
        if known is None:
            compiled = self._clause.compile(dialect=dialect)
            known = self._compiled[dialect.name] = str(compiled), compiled
        text, compiled = known
        given = compiled.construct_params(values)
        if compiled.positional:
            given = tuple(given[name] for name in compiled.positiontup)
        return connection.exec_driver_sql(text, given)
