"""What differs between SQLite, PostgreSQL, MariaDB and MySQL: types, the clock, inserting.

SQLAlchemy levels out most of it; here is the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

BigInt = sa.BigInteger().with_variant(sa.Integer, "sqlite")
Seconds: sa.Double[float] = sa.Double()
Blob = sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
LongText = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
#: An id: MySQL's default collation would take "a" and "A" for the same one.
Identifier = sa.String(255).with_variant(
    mysql.VARCHAR(255, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
)


class database_now(FunctionElement[float]):
    """Seconds since the epoch on the database's clock, which all processes share."""

    type = Seconds
    inherit_cache = True


@compiles(database_now, "sqlite")
def _now_sqlite(element: object, compiler: object, **options: object) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(database_now, "postgresql")
def _now_postgresql(element: object, compiler: object, **options: object) -> str:
    # Not clock_timestamp(): it may change within a statement, so no index could be used.
    return "CAST(EXTRACT(EPOCH FROM statement_timestamp()) AS DOUBLE PRECISION)"


@compiles(database_now, "mysql")
@compiles(database_now, "mariadb")
def _now_mysql(element: object, compiler: object, **options: object) -> str:
    # Of UTC: local time, by which UNIX_TIMESTAMP() goes, is set back once a year.
    return "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) / 1e6)"


def insert_new(connection: sa.Connection, table: sa.Table, values: Mapping[str, Any]) -> bool:
    """Insert a row unless its key is there already; returns whether it was inserted.

    Waits for a transaction that has inserted the same key and has not ended yet.
    """
    dialect = connection.dialect.name
    statement: sa.Insert
    if dialect == "postgresql":
        statement = postgresql.insert(table).values(**values).on_conflict_do_nothing()
    elif dialect == "sqlite":
        statement = sqlite.insert(table).values(**values).on_conflict_do_nothing()
    else:
        statement = sa.insert(table).values(**values).prefix_with("IGNORE")
    # Drivers count the rows of an INSERT, but SQLAlchemy keeps the count only if asked to.
    result = connection.execute(statement, execution_options={"preserve_rowcount": True})
    return result.rowcount == 1


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
