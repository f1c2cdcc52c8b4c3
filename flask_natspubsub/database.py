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
from typing import Any, cast

import sqlalchemy as sa
from flask import Flask, has_app_context
from sqlalchemy import orm
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import NoSuchTableError, SQLAlchemyError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

from .errors import ConfigurationError, DatabaseError, TablesMissing

#: Longest time a statement of the relay or of a clean-up may take, seconds.
STATEMENT_TIMEOUT = 10.0

BigInt = sa.BigInteger().with_variant(sa.Integer, "sqlite")
Seconds: sa.Double[float] = sa.Double()
Blob = sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
LongText = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


class database_now(FunctionElement[float]):
    """Seconds since the epoch on the database's clock, which all processes share."""

    type = Seconds
    inherit_cache = True


@compiles(database_now, "sqlite")
def _now_sqlite(element: object, compiler: object, **options: object) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(database_now, "postgresql")
def _now_postgresql(element: object, compiler: object, **options: object) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


@compiles(database_now, "mysql")
@compiles(database_now, "mariadb")
def _now_mysql(element: object, compiler: object, **options: object) -> str:
    return "CAST(UNIX_TIMESTAMP(SYSDATE(6)) AS DOUBLE)"


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


class Database:
    """The engine, the session and the metadata that the application uses.

    :param db: the Flask-SQLAlchemy or Flask-SQLAlchemy-Lite object.
    :param metadata: where the tables are defined; default ``db.metadata``.
    :param bind_key: the bind of the domain tables, if it is not the default one.
    """

    def __init__(
        self, app: Flask, db: Any, metadata: sa.MetaData | None, bind_key: str | None
    ) -> None:
        self.bind_key = bind_key
        #: Seconds by which a test has moved the clock of what is due.
        self.skew = 0.0
        self._app = app
        self._db = db
        self.metadata = metadata if metadata is not None else _metadata_of(db, bind_key)
        self._known_tables: set[str] = set()

    @property
    def session(self) -> orm.Session:
        """The caller's session.

        :raises ConfigurationError: there is no application context.
        """
        if not has_app_context():
            raise ConfigurationError(
                "The outbox writes in the session of an application context, and there is none.",
                "Use it inside 'with app.app_context():', or publish with outbox=False.",
            )
        session = self._db.session
        return cast(orm.Session, session() if isinstance(session, orm.scoped_session) else session)

    @property
    def has_pending_changes(self) -> bool:
        """Whether the caller's session, if there is one yet, has changes not committed."""
        if not has_app_context():
            return False
        session = self._db.session
        if isinstance(session, orm.scoped_session):
            if not session.registry.has():
                return False
            session = session()
        return bool(session.new or session.dirty or session.deleted)

    def now(self) -> sa.ColumnElement[float]:
        """Return the clock by which rows are due: the database's, which all processes share."""
        return database_now() + self.skew if self.skew else database_now()

    @property
    def engine(self) -> sa.Engine:
        """The engine of the bind."""
        if has_app_context():
            return self._engine()
        with self._app.app_context():
            return self._engine()

    def _engine(self) -> sa.Engine:
        engines = self._db.engines
        key = self.bind_key
        if key not in engines and key is None:
            key = "default"
        if key not in engines:
            raise ConfigurationError(
                f"NATSPUBSUB_BIND_KEY is {self.bind_key!r}, and there is no such bind.",
                f"Known: {', '.join(map(repr, engines))}.",
            )
        return cast(sa.Engine, engines[key])

    @property
    def dialect(self) -> str:
        """``sqlite``, ``postgresql``, ``mysql`` or ``mariadb``."""
        return self.engine.dialect.name

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """Open a transaction of the extension's own, on a connection of the user's pool.

        :raises DatabaseError: the database failed or took too long.
        """
        try:
            with self.engine.begin() as connection:
                if connection.dialect.name == "postgresql":
                    limit = str(int(STATEMENT_TIMEOUT * 1000))
                    connection.execute(sa.text(f"SET LOCAL statement_timeout = {limit}"))
                yield connection
        except NoSuchTableError as error:
            raise _tables_missing() from error
        except SQLAlchemyError as error:
            raise DatabaseError(f"The database failed: {_first_line(error)}") from error

    def require_table(self, session: orm.Session, table: sa.Table) -> None:
        """Check once that a table exists; otherwise the error would come at the commit.

        :raises TablesMissing: it does not.
        """
        if table.name in self._known_tables:
            return
        connection = session.connection(bind_arguments={"clause": table})
        if not sa.inspect(connection).has_table(table.name, schema=table.schema):
            raise _tables_missing()
        self._known_tables.add(table.name)


def _metadata_of(db: Any, bind_key: str | None) -> sa.MetaData:
    metadatas = getattr(db, "metadatas", None)
    if metadatas is not None and bind_key is not None:
        if bind_key not in metadatas:
            raise ConfigurationError(
                f"NATSPUBSUB_BIND_KEY is {bind_key!r}, and no model has this __bind_key__.",
                "Import the models before init_app, or pass metadata=.",
            )
        return cast(sa.MetaData, metadatas[bind_key])
    metadata = getattr(db, "metadata", None)
    if not isinstance(metadata, sa.MetaData):
        raise ConfigurationError(
            "The database object has no metadata to define the outbox tables in.",
            "With Flask-SQLAlchemy-Lite, pass your models': init_app(app, db, Model.metadata).",
        )
    return metadata


def _tables_missing() -> TablesMissing:
    return TablesMissing(
        "The tables of the outbox and the inbox are not in the database.",
        "Run 'flask db migrate' and 'flask db upgrade', or db.create_all(); "
        "'flask natspubsub outbox ddl' prints the SQL.",
    )


def _first_line(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]


class Leases:
    """Rights in ``natspubsub_lease``; at any time at most one owner holds a name."""

    def __init__(self, database: Database, table: sa.Table, seconds: float) -> None:
        self.table = table
        self.seconds = seconds
        self._database = database

    def acquire(self, name: str, owner: str) -> Lease | None:
        """Take a free or expired lease; None while somebody else has it."""
        table = self.table
        take = (
            sa.update(table)
            .where(table.c.name == name, table.c.expires_at < database_now())
            .values(owner=owner, token=table.c.token + 1, expires_at=self._until())
        )
        with self._database.begin() as connection:
            if connection.execute(take).rowcount != 1 and not self._create(connection, name, owner):
                return None
            token = connection.execute(
                sa.select(table.c.token).where(table.c.name == name, table.c.owner == owner)
            ).scalar_one()
        return Lease(name, owner, int(token))

    def _create(self, connection: sa.Connection, name: str, owner: str) -> bool:
        values = {"name": name, "owner": owner, "token": 1, "expires_at": self._until()}
        return insert_new(connection, self.table, values)

    def renew(self, lease: Lease) -> bool:
        """Extend a lease; False if it is lost."""
        with self._database.begin() as connection:
            return self.renew_in(connection, lease)

    def renew_in(self, connection: sa.Connection, lease: Lease) -> bool:
        """Extend a lease within a transaction, which it thereby fences: False if it is lost."""
        statement = sa.update(self.table).where(self._is(lease)).values(expires_at=self._until())
        return connection.execute(statement).rowcount == 1

    def release(self, lease: Lease) -> None:
        """Give a lease back, so that another may take it at once."""
        with self._database.begin() as connection:
            connection.execute(sa.update(self.table).where(self._is(lease)).values(expires_at=0.0))

    def holders(self) -> list[dict[str, Any]]:
        """Return name, owner and remaining seconds of every lease."""
        table = self.table
        left = (table.c.expires_at - database_now()).label("seconds_left")
        with self._database.begin() as connection:
            rows = connection.execute(sa.select(table.c.name, table.c.owner, left))
            return [dict(row) for row in rows.mappings()]

    def _is(self, lease: Lease) -> sa.ColumnElement[bool]:
        columns = self.table.c
        return sa.and_(
            columns.name == lease.name, columns.owner == lease.owner, columns.token == lease.token
        )

    def _until(self) -> sa.ColumnElement[float]:
        return database_now() + self.seconds
