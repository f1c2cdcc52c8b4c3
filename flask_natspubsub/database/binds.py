"""Where the user's tables are: the engine, the session, and the connection between the two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, cast

import sqlalchemy as sa
from flask import Flask, current_app, has_app_context
from sqlalchemy import orm
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.util import ThreadLocalRegistry

from ..errors import ConfigurationError
from .session_events import begun, end_of_scope, forgive, writing_bind
from .statements import SCHEMA_MAP


class Binds:
    """What the extension's tables are bound to.

    :param db: the Flask-SQLAlchemy or Flask-SQLAlchemy-Lite object.
    :param bind_key: the bind of the domain tables, if it is not the default one.
    """

    def __init__(self, app: Flask, db: Any, bind_key: str | None) -> None:
        self.bind_key = bind_key
        #: Whether a test may have put the sessions, and so this as well, on one connection.
        self.joins_session = False
        self._app = app
        self._db = db
        self._engines: Mapping[str | None, Any] | None = None
        self._schema: dict[str | None, str | None] | None = None

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

    def end_of_context(self) -> None:
        """Look for a session of the application context that its end has left behind.

        One that was made when the others had been removed already, by a teardown function.
        """
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
        # With other options, an engine has another one of the same database for a base.
        return bind.engine is self.engine or bind.engine.url == self.engine.url

    def has_other_binds(self, session: orm.Session, classes: Iterable[type]) -> bool:
        """Whether the rows of one of these classes are in another database than the outbox."""
        if not has_app_context() or len(self._db.engines) < 2:
            return False
        tables = {one: orm.class_mapper(one).local_table for one in classes}
        return any(
            not self._is_ours(writing_bind(session, table, one)) for one, table in tables.items()
        )


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
