"""Statements that are worth a function of their own.

Some run so often that to put them together would cost more than to run them; others differ
between databases, or where the tables have another schema than it seems.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite

#: The execution option that has other schemas in the place of those of the tables.
SCHEMA_MAP = "schema_translate_map"


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
        if connection.get_execution_options().get(SCHEMA_MAP):
            return connection.execute(self._clause, values)
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


def table_name(connection: sa.Connection, table: sa.Table) -> str:
    """Return the quoted name of a table, for a statement in text."""
    quoted = connection.dialect.identifier_preparer
    schema, name = connection.schema_for_object(table), quoted.quote(table.name)
    return name if schema is None else f"{quoted.quote_schema(schema)}.{name}"


def insert_or_leave(dialect: sa.Dialect, table: sa.Table, key: sa.Column[Any]) -> sa.Insert:
    """Make an INSERT that does nothing where the unique ``key`` is there already.

    Unlike ``IGNORE`` it hides no other error; MySQL counts the row as found all the same.
    """
    if dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing(index_elements=[key])
    if dialect.name == "sqlite":
        return sqlite.insert(table).on_conflict_do_nothing(index_elements=[key])
    return mysql.insert(table).on_duplicate_key_update({key.name: key})
