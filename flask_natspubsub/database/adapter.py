"""The user's database, as the outbox and the inbox see it.

A thin adapter over Flask-SQLAlchemy and Flask-SQLAlchemy-Lite: both put themselves in
``app.extensions["sqlalchemy"]`` and have ``session`` and ``engines``. It knows where the user's
tables are: the engine, the session, and the connection between the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, cast

import sqlalchemy as sa
from flask import Flask, appcontext_tearing_down, current_app, has_app_context
from sqlalchemy import orm
from sqlalchemy.exc import SQLAlchemyError, UnboundExecutionError
from sqlalchemy.util import ThreadLocalRegistry

from ..errors import ConfigurationError, DatabaseError, TablesMissing
from .dialects import database_now
from .session_events import end_of_scope, forgive, has_changes

#: Longest time a statement of the relay or of a clean-up may take, seconds.
STATEMENT_TIMEOUT = 10.0
#: The execution option that has other schemas in the place of those of the tables.
SCHEMA_MAP = "schema_translate_map"


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
        #: Whether a test may have put the sessions, and so this as well, on one connection.
        self.joins_session = False
        #: Seconds by which a test has moved the clock of what is due.
        self.skew = 0.0
        self.metadata = metadata if metadata is not None else metadata_of(db, bind_key)
        self._app = app
        self._db = db
        self._engines: Mapping[str | None, Any] | None = None
        self._schema: dict[str | None, str | None] | None = None
        #: The tables that were found to be there.
        self.known_tables: set[str] = set()
        #: Whether the application has several databases; known once a table was looked for.
        self.has_several_binds = False
        self._our_engine: sa.Engine | None = None
        appcontext_tearing_down.connect(self._on_teardown, app)

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

    def present_session(self) -> orm.Session | None:
        """Return the caller's session if there is one yet."""
        if not has_app_context():
            return None
        session = self._db.session
        if isinstance(session, orm.scoped_session):
            return session() if session.registry.has() else None
        return cast(orm.Session, session)

    def forgive(self) -> None:
        """Take it that the caller's session, if there is one yet, is to end without a commit."""
        session = self.present_session()
        if session is not None:
            forgive(session)

    def _on_teardown(self, sender: Flask, exc: BaseException | None = None, **_: Any) -> None:
        """Look for a session of the application context that its end has left behind.

        One that was made when the others had been removed already, by a teardown function.
        """
        if exc is not None:
            return
        session = vars(self._db).get("session")  # what is made when asked for is made anew
        if not isinstance(session, orm.scoped_session):
            return
        with suppress(RuntimeError):  # the session may be that of a request
            if not isinstance(session.registry, ThreadLocalRegistry) and session.registry.has():
                end_of_scope(session())

    @property
    def engine(self) -> sa.Engine:
        """The engine of the bind."""
        return self.bind.engine

    @property
    def bind(self) -> sa.Engine | sa.Connection:
        """Return the engine of the bind; tests may have put a connection in its place.

        All are looked up once: the relay has no application context, and the end of one that
        were pushed for each statement would run the application's teardown functions.
        """
        if self._engines is None:
            if has_app_context() and current_app == self._app:
                self._engines = self._db.engines
            else:
                with self._app.app_context():
                    self._engines = self._db.engines
        engines = cast(Mapping[str | None, sa.Engine], self._engines)
        key = self.bind_key
        if key not in engines and key is None:
            key = "default"
        if key not in engines:
            raise ConfigurationError(
                f"NATSPUBSUB_BIND_KEY is {self.bind_key!r}, and there is no such bind.",
                f"Known: {', '.join(map(repr, engines))}.",
            )
        return (self.joins_session and self._connection_of_session()) or engines[key]

    def _connection_of_session(self) -> sa.Connection | None:
        """Return the connection that a test has bound the sessions to, if it has."""
        with suppress(RuntimeError, UnboundExecutionError):  # no application context; no bind
            session = self._db.session
            bind = (session() if callable(session) else session).get_bind()
            return bind if isinstance(bind, sa.Connection) and not bind.closed else None
        return None

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Have sessions within leave a test's own transaction as it was, if they fail."""
        bind = self.bind
        with begun(bind) if isinstance(bind, sa.Connection) else nullcontext():
            yield

    def _keep_schema(self, connection: sa.Connection, table: sa.Table) -> None:
        """Name the schema in which an engine's connections look first, if the table is there."""
        name = connection.dialect.default_schema_name
        if connection.dialect.name != "postgresql" or table.schema is not None:
            return
        if sa.inspect(connection).has_table(table.name, schema=name):
            self._schema = {None: name}

    @contextmanager
    def in_place(self, session: orm.Session, table: sa.Table) -> Iterator[sa.Connection]:
        """Yield ``connection`` with the tables where the engine, and so the relay, finds them.

        A session may put a tenant's schema in place of theirs, by ``schema_translate_map`` or by
        PostgreSQL's ``search_path``.
        """
        connection = self.connection(session, table)
        before = connection.get_execution_options().get(SCHEMA_MAP)
        ours = self.engine.get_execution_options().get(SCHEMA_MAP) or self._schema
        if before == ours:
            yield connection
            return
        connection.execution_options(**{SCHEMA_MAP: ours})
        try:
            yield connection
        finally:
            connection.execution_options(**{SCHEMA_MAP: before})

    def connection(self, session: orm.Session, table: sa.Table) -> sa.Connection:
        """Return the connection of the session's transaction on which a table is read and written.

        Where the session writes, also for reads: one that reads from a replica would miss what
        was written a moment ago.

        :raises ConfigurationError: the session writes to another database.
        """
        found = session.get_bind(clause=table)
        if not self._is_ours(found):
            found = writing_bind(session, table)
        if self._is_ours(found):
            return session.connection(bind_arguments={"bind": found})
        raise ConfigurationError(
            f"The session writes {table.name} to {found.engine.url!r}, and the relay "
            f"reads it from {self.engine.url!r}.",
            "Set NATSPUBSUB_BIND_KEY, and with Flask-SQLAlchemy-Lite the session's binds=.",
        )

    def _is_ours(self, bind: sa.Engine | sa.Connection) -> bool:
        engine = bind.engine
        if engine is self._our_engine:
            return True
        # With other options, an engine has another one of the same database for a base.
        if engine is not self.engine and engine.url != self.engine.url:
            return False
        self._our_engine = engine
        return True

    def has_other_binds(self, session: orm.Session, classes: Iterable[type]) -> bool:
        """Whether the rows of one of these classes are in another database than the outbox."""
        if not has_app_context():
            return False
        tables = {one: orm.class_mapper(one).local_table for one in classes}
        return any(
            not self._is_ours(writing_bind(session, table, one)) for one, table in tables.items()
        )

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
        if table.name in self.known_tables:
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
        self.has_several_binds = len(self._db.engines) > 1
        self.known_tables.add(table.name)


def metadata_of(db: Any, bind_key: str | None) -> sa.MetaData:
    """Return the metadata that the tables are to be defined in."""
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


def writing_bind(
    session: orm.Session, table: sa.FromClause, mapper: type | None = None
) -> sa.Engine | sa.Connection:
    """Return what a session is bound to when it writes, which may differ from where it reads.

    As SQLAlchemy's docs have it, ``get_bind`` goes by the statement or by ``_flushing``.
    """
    inner = vars(session)
    before = inner.get("_flushing", False)
    inner["_flushing"] = True
    try:
        return session.get_bind(mapper, clause=sa.update(cast(sa.Table, table)))
    finally:
        inner["_flushing"] = before


@contextmanager
def begun(bind: sa.Engine | sa.Connection) -> Iterator[sa.Connection]:
    """Begin on an engine; on a connection whose transaction is a test's, a part of that."""
    if isinstance(bind, sa.Engine):
        with bind.begin() as connection:
            yield connection
    else:
        with bind.begin_nested():
            yield bind


def commits_by_itself(connection: sa.Connection) -> bool:
    """Whether the user has set AUTOCOMMIT, for the connection or for the engine."""
    of_engine = getattr(connection.dialect, "_on_connect_isolation_level", None)
    return "AUTOCOMMIT" in (connection.get_execution_options().get("isolation_level"), of_engine)


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
