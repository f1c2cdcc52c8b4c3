"""How a row of the inbox is inserted without waiting for long.

Another transaction may have inserted the same row and not ended yet. It may even never end: where
a machine has vanished, the database keeps its connection, and the lock, for hours. PostgreSQL,
MariaDB and MySQL have a limit for such waits that is raised, or off, for the user's own work; it is
set for this one statement. SQLite's is the ``timeout`` of its connections.
"""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.sql.dml import ReturningInsert

from ..database.dialects import database_now, insert_new, table_name

#: Longest wait for another transaction that has the row; seconds.
WAIT = 2.0
_WAS = "natspubsub_lock_timeout"
_LOCKED_STATE, _LOCKED_NUMBER = "55P03", 1205


class Claims:
    """Inserts rows into the table of the inbox."""

    def __init__(self, table: sa.Table) -> None:
        self._table = table
        self._mariadb: dict[str, sa.TextClause] = {}
        #: Made once: to make one takes longer than SQLite takes to execute it.
        self._sqlite = (
            sqlite.insert(table)
            .values({**self._given(), "processed_at": database_now()})
            .on_conflict_do_nothing()
        )
        self._postgresql: dict[tuple[int, int], ReturningInsert[tuple[str]]] = {}

    def _given(self) -> dict[str, sa.BindParameter[str]]:
        columns = (self._table.c.event_id, self._table.c.subscriber)
        return {one.name: sa.bindparam(f"its_{one.name}", type_=one.type) for one in columns}

    def insert(self, connection: sa.Connection, key: Mapping[str, str]) -> bool:
        """Insert the row of a key; False if it is there already.

        :raises sqlalchemy.exc.DBAPIError: the wait for another transaction took too long, see
            ``is_locked``; or the database failed.
        """
        name = connection.dialect.name
        if name == "postgresql":
            return self._insert_postgresql(connection, key)
        if name in ("mysql", "mariadb"):
            return self._insert_mysql(connection, key)
        options = {"preserve_rowcount": True}
        done = connection.execute(self._sqlite, _parameters(key), execution_options=options)
        return done.rowcount == 1

    def _insert_postgresql(self, connection: sa.Connection, key: Mapping[str, str]) -> bool:
        """Set the limit, insert, and set it back in one statement: the way there costs most."""
        was = connection.info.get(_WAS)
        if was is None:
            was = connection.info[_WAS] = int(connection.execute(_LOCK_TIMEOUT).scalar_one())
        wait = min(int(WAIT * 1000), was or 3_600_000)
        statement = self._postgresql.get((wait, was))
        if statement is None:
            statement = self._postgresql[wait, was] = self._postgresql_statement(wait, was)
        return connection.execute(statement, _parameters(key)).first() is not None

    def _postgresql_statement(self, wait: int, was: int) -> ReturningInsert[tuple[str]]:
        given = self._given()
        values = [sa.cast(value, value.type) for value in given.values()]
        row = sa.select(*values, database_now()).where(_set_lock_timeout(wait).is_not(None))
        return (
            postgresql.insert(self._table)
            .from_select([*given, "processed_at"], row)
            .on_conflict_do_nothing()
            .returning(_set_lock_timeout(was))
        )

    def _insert_mysql(self, connection: sa.Connection, key: Mapping[str, str]) -> bool:
        if getattr(connection.dialect, "is_mariadb", False):
            result = connection.execute(
                self._mariadb_statement(connection),
                dict(key),
                execution_options={"preserve_rowcount": True},
            )
            return result.rowcount == 1
        was = connection.exec_driver_sql("SELECT @@SESSION.innodb_lock_wait_timeout").scalar_one()
        _set_lock_wait(connection, int(WAIT))
        try:
            return insert_new(connection, self._table, {**key, "processed_at": database_now()})
        finally:
            if not connection.invalidated:
                _set_lock_wait(connection, int(was))

    def _mariadb_statement(self, connection: sa.Connection) -> sa.TextClause:
        table = table_name(connection, self._table)
        statement = self._mariadb.get(table)
        if statement is None:
            now = database_now().compile(dialect=connection.dialect)
            statement = self._mariadb[table] = sa.text(
                f"SET STATEMENT innodb_lock_wait_timeout = {WAIT:g} FOR INSERT IGNORE INTO {table} "  # noqa: S608 - the name of the table is ours
                f"(event_id, subscriber, processed_at) VALUES (:event_id, :subscriber, {now})"
            )
        return statement


def _parameters(key: Mapping[str, str]) -> dict[str, str]:
    return {f"its_{name}": value for name, value in key.items()}


def is_locked(error: SQLAlchemyError) -> bool:
    """Whether another transaction had the row, or all of an SQLite database, for too long."""
    cause = getattr(error, "orig", None)
    state = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    number = cause.args[0] if cause is not None and cause.args else None
    in_words = str(cause).startswith(("database is locked", "database table is locked"))
    return state == _LOCKED_STATE or number == _LOCKED_NUMBER or in_words


_LOCK_TIMEOUT = sa.text("SELECT setting FROM pg_settings WHERE name = 'lock_timeout'")


def _set_lock_timeout(milliseconds: int) -> sa.Function[str]:
    """Set it until the end of the transaction."""
    return sa.func.set_config("lock_timeout", str(milliseconds), sa.true(), type_=sa.String)


def _set_lock_wait(connection: sa.Connection, seconds: int) -> None:
    connection.exec_driver_sql(f"SET SESSION innodb_lock_wait_timeout = {seconds:d}")
