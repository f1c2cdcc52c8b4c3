"""The user's database, as the outbox and the inbox see it.

A thin adapter over Flask-SQLAlchemy and Flask-SQLAlchemy-Lite: both put themselves in
``app.extensions["sqlalchemy"]`` and have ``session`` and ``engines``. Everything that differs
between SQLite, PostgreSQL, MariaDB and MySQL and is not about one table is here too: the
database's clock, inserting what may be there already, time limits, leases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from flask import Flask
from sqlalchemy import orm
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

from ..errors import ConfigurationError, DatabaseError, TablesMissing
from .binds import Binds, metadata_of
from .session_events import begun, commits_by_itself, has_changes
from .statements import Statement

#: Longest time a statement of the relay or of a clean-up may take, seconds.
STATEMENT_TIMEOUT = 10.0
#: By less than this many seconds a clock may be put back without a lease being taken for it.
CLOCK_STEP = 1.0

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


def make_lease_table(metadata: sa.MetaData) -> sa.Table:
    """Define ``natspubsub_lease`` in the user's metadata."""
    return sa.Table(
        "natspubsub_lease",
        metadata,
        sa.Column("name", sa.String(191), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("token", BigInt, nullable=False),
        sa.Column("expires_at", Seconds, nullable=False),
    )


@dataclass(frozen=True, slots=True)
class Lease:
    """A right that one process has until it expires; ``token`` grows with each owner."""

    name: str
    owner: str
    token: int


class Database(Binds):
    """The engine, the session and the metadata that the application uses.

    :param db: the Flask-SQLAlchemy or Flask-SQLAlchemy-Lite object.
    :param metadata: where the tables are defined; default ``db.metadata``.
    :param bind_key: the bind of the domain tables, if it is not the default one.
    """

    def __init__(
        self, app: Flask, db: Any, metadata: sa.MetaData | None, bind_key: str | None
    ) -> None:
        super().__init__(app, db, bind_key)
        #: Seconds by which a test has moved the clock of what is due.
        self.skew = 0.0
        self.metadata = metadata if metadata is not None else metadata_of(db, bind_key)
        self._known_tables: set[str] = set()

    @property
    def has_pending_changes(self) -> bool:
        """Whether the caller's session, if there is one yet, has changes not committed."""
        session = self.present_session()
        return session is not None and has_changes(session)

    def now(self) -> sa.ColumnElement[float]:
        """Return the clock by which rows are due: the database's, which all processes share."""
        return database_now() + self.skew if self.skew else database_now()

    @property
    def dialect(self) -> str:
        """``sqlite``, ``postgresql``, ``mysql`` or ``mariadb``."""
        return self.engine.dialect.name

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """Open a transaction of the extension's own, on a connection of the user's pool.

        :raises DatabaseError: the database failed or took too long.
        """
        bind = self.bind
        try:
            with begun(bind) as connection:
                if connection.dialect.name == "postgresql" and bind is not connection:
                    limit = str(int(STATEMENT_TIMEOUT * 1000))
                    connection.execute(sa.text(f"SET LOCAL statement_timeout = {limit}"))
                yield connection
        except SQLAlchemyError as error:
            if _is_missing_table(error):
                raise _tables_missing() from error
            raise DatabaseError(f"The database failed: {_first_line(error)}") from error

    def keeps_savepoints(self) -> bool:
        """Whether a savepoint's release commits nothing; writes nothing to find out.

        Python's SQLite driver, unless told otherwise, begins no transaction before a savepoint.

        :raises DatabaseError: the database failed.
        """
        if self.dialect != "sqlite":
            return True
        with self.begin() as connection:
            with connection.begin_nested():
                pass
            return bool(getattr(connection.connection.driver_connection, "in_transaction", True))

    def require_table(self, session: orm.Session, table: sa.Table) -> None:
        """Check once that the session can write to a table; the commit would be too late.

        :raises TablesMissing: the table does not exist.
        :raises ConfigurationError: the session would write to another database, or its
            transactions are none.
        """
        if table.name in self._known_tables:
            return
        connection = self.connection(session, table)
        if commits_by_itself(connection):
            raise ConfigurationError(
                "The database's isolation level is AUTOCOMMIT: a row and its event would not be "
                "committed together.",
                "Use another level for this engine, or publish with outbox=False.",
            )
        if not sa.inspect(connection).has_table(table.name, schema=table.schema):
            raise _tables_missing()
        self._keep_schema(connection, table)
        self._known_tables.add(table.name)


def _tables_missing() -> TablesMissing:
    return TablesMissing(
        "The tables of the outbox and the inbox are not in the database.",
        "Run 'flask db migrate' and 'flask db upgrade', or db.create_all(); "
        "'flask natspubsub outbox ddl' prints the SQL.",
    )


def _is_missing_table(error: SQLAlchemyError) -> bool:
    """Tell a missing table by what each driver says: SQLite in words, the others by number."""
    cause = getattr(error, "orig", None)
    number = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    code = cause.args[0] if cause is not None and cause.args else None
    return str(cause).startswith("no such table") or number == "42P01" or code == 1146


def _first_line(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]


class Leases:
    """Rights in ``natspubsub_lease``; at any time at most one owner holds a name.

    One with more time left than any lease is given was taken by a clock that was wrong then and
    has been put back since: it counts as expired.
    """

    def __init__(self, database: Database, table: sa.Table, seconds: float) -> None:
        self.table = table
        self.seconds = seconds
        self._database = database
        ours = [table.c[name] == sa.bindparam(f"its_{name}") for name in ("name", "owner", "token")]
        self._renew = Statement(sa.update(table).where(*ours).values(expires_at=self._until()))

    def acquire(self, name: str, owner: str) -> Lease | None:
        """Take a free or expired lease; None while somebody else has it.

        Looks before it writes, and in transactions of their own: those who wait for a lease
        look often, and a look is all that SQLite can take beside a writer.
        """
        columns = self.table.c
        look = sa.select(columns.token, self._is_free())
        with self._database.begin() as connection:
            row = connection.execute(look.where(columns.name == name)).first()
        if row is None:
            return self._create(Lease(name, owner, 1))
        token, expired = row
        return self._take(Lease(name, owner, int(token) + 1)) if expired else None

    def _create(self, lease: Lease) -> Lease | None:
        values = {"name": lease.name, "owner": lease.owner, "token": lease.token}
        with self._database.begin() as connection:
            created = insert_new(connection, self.table, values | {"expires_at": self._until()})
        return lease if created else None

    def _take(self, lease: Lease) -> Lease | None:
        columns = self.table.c
        statement = (
            sa.update(self.table)
            .where(columns.name == lease.name, columns.token == lease.token - 1)
            .where(self._is_free())
            .values(owner=lease.owner, token=lease.token, expires_at=self._until())
        )
        with self._database.begin() as connection:
            return lease if connection.execute(statement).rowcount == 1 else None

    def renew(self, lease: Lease) -> bool:
        """Extend a lease; False if it is lost."""
        with self._database.begin() as connection:
            return self.renew_in(connection, lease)

    def renew_in(self, connection: sa.Connection, lease: Lease) -> bool:
        """Extend a lease within a transaction, which it thereby fences: False if it is lost."""
        renewed = self._renew.execute(
            connection, its_name=lease.name, its_owner=lease.owner, its_token=lease.token
        )
        return renewed.rowcount == 1

    def release(self, lease: Lease) -> None:
        """Give a lease back, so that another may take it at once."""
        with self._database.begin() as connection:
            connection.execute(sa.update(self.table).where(self._is(lease)).values(expires_at=0.0))

    def holders(self) -> list[dict[str, Any]]:
        """Return name, owner and remaining seconds of every lease."""
        table = self.table
        left = (table.c.expires_at - database_now()).label("seconds_left")
        with self._database.begin() as connection:
            query = sa.select(table.c.name, table.c.owner, left)
            rows = connection.execute(query.where(table.c.owner != ""))
            return [dict(row) for row in rows.mappings()]

    def held(self) -> list[str]:
        """Return the names of the leases that somebody has now."""
        columns = self.table.c
        held = sa.select(columns.name).where(columns.expires_at >= database_now())
        with self._database.begin() as connection:
            return list(connection.execute(held).scalars())

    def _is(self, lease: Lease) -> sa.ColumnElement[bool]:
        columns = self.table.c
        return sa.and_(
            columns.name == lease.name, columns.owner == lease.owner, columns.token == lease.token
        )

    def _is_free(self) -> sa.ColumnElement[bool]:
        until = self.table.c.expires_at
        return sa.or_(until < database_now(), until > self._until() + CLOCK_STEP)

    def _until(self) -> sa.ColumnElement[float]:
        return database_now() + self.seconds
