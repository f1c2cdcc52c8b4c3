"""The table of what has been handled: a handler's database effects happen once.

The row of an event and a subscriber, as ``messages.identity`` names them, is inserted in the
handler's own session before the handler runs and is committed with what the handler did. A
redelivery finds it; of two copies at the same time the unique key lets one wait for the other and
then skip.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.exc import DataError, DBAPIError, SQLAlchemyError, StatementError

from ..database.adapter import Database
from ..database.dialects import Identifier, Seconds, database_now, insert_new
from ..database.session_events import FAILED, record_of
from ..errors import DatabaseError, InboxBusy, NatsPubsubError
from ..messages.identity import Handling, subscriber_key
from ..text import get_logger
from .claims import Claims, is_locked
from .takeover import Takeover

_log = get_logger("flask_natspubsub.worker")

_INFO = "natspubsub_inbox"
CLEAN_BATCH = 1000
RENAME_BATCH = 500


class TransactionLost(NatsPubsubError):
    """The database gave the handler's transaction up, and the handler did not notice."""

    code = "transaction-lost"


def define_table(metadata: sa.MetaData) -> sa.Table:
    """Define ``natspubsub_inbox`` in the user's metadata, once."""
    table: sa.Table | None = metadata.info.get(_INFO)
    if table is None:
        table = metadata.info[_INFO] = sa.Table(
            "natspubsub_inbox",
            metadata,
            sa.Column("event_id", Identifier, primary_key=True),
            sa.Column("subscriber", sa.String(191), primary_key=True),
            sa.Column("processed_at", Seconds, nullable=False, index=True),
        )
    return table


class Inbox:
    """Begins and ends the transactions that handlers work in."""

    def __init__(self, database: Database, table: sa.Table, leases: sa.Table) -> None:
        self.table = table
        self._claims = Claims(table)
        self._takeover = Takeover(table, leases, self._claims)
        self._database = database
        this_row = sa.and_(
            table.c.event_id == sa.bindparam("event_id"),
            table.c.subscriber == sa.bindparam("subscriber"),
        )
        self._find = sa.select(sa.literal(1)).where(this_row)
        self._forget = sa.delete(table).where(this_row)
        self._warned: set[str] = set()

    def begin(self, handling: Handling, *, once: bool) -> HandlerWork | None:
        """Begin what one handler does with one event.

        :param once: insert the inbox row; waits, not for long, for another transaction that has
            inserted it and has not ended yet.
        :returns: None if ``once`` and this was handled before.
        :raises InboxBusy: another transaction has inserted the row and does not end.
        :raises DatabaseError: the inbox could not be asked, or its table is missing.
        """
        session = self.session
        if once:
            with _asking():
                self._database.require_table(session, self.table)
                if not self.claim(session, handling):
                    session.rollback()
                    return None
        return HandlerWork(self, session, handling, once)

    @property
    def session(self) -> orm.Session:
        """The session of the application context, which may not be the one it had before."""
        return self._database.session

    def claim(self, session: orm.Session, handling: Handling) -> bool:
        """Insert the row in the session's transaction; False if it is there already."""
        with self._database.in_place(session, self.table) as connection:
            connection.info.pop(FAILED, None)
            new = self._claims.insert(connection, _key(handling))
            return new and self._takeover.claim(connection, handling)

    def unclaim(self, session: orm.Session, handling: Handling) -> None:
        """Delete the row in the session's transaction."""
        with self._database.in_place(session, self.table) as connection:
            connection.execute(self._forget, _key(handling))
            self._takeover.unclaim(connection, handling)

    def has(self, session: orm.Session, handling: Handling) -> bool:
        """Whether the session's transaction still has the row; looks after an error only."""
        with self._database.in_place(session, self.table) as connection:
            if FAILED not in connection.info:
                return True
            return connection.execute(self._find, _key(handling)).first() is not None

    def warn_of_commit(self, subscriber: str) -> None:
        """Name, once, a handler that does not leave the commit to the worker."""
        if subscriber in self._warned:
            return
        self._warned.add(subscriber)
        _log.warning(
            "the handler %s commits by itself: if it fails or dies after that, what it has "
            "committed happens twice. Leave the commit to the worker, or use "
            "session.begin_nested()",
            subscriber,
        )

    # --- for the commands and the relay

    def counts(self) -> dict[str, Any]:
        """Return the number of rows by subscriber."""
        column = self.table.c.subscriber
        query = sa.select(column, sa.func.count()).group_by(column).order_by(column)
        with self._database.begin() as connection:
            return {row[0]: int(row[1]) for row in connection.execute(query)}

    def purge(self, older_than: float, batch: int = CLEAN_BATCH) -> int:
        """Delete up to ``batch`` rows older than so many seconds; returns how many."""
        table = self.table
        old = (
            sa.select(table.c.event_id, table.c.subscriber)
            .where(self._is_old(older_than))
            .limit(batch)
        )
        with self._database.begin() as connection:
            keys = [tuple(row) for row in connection.execute(old)]
            if not keys:
                return 0
            key = sa.tuple_(table.c.event_id, table.c.subscriber)
            return connection.execute(sa.delete(table).where(key.in_(keys))).rowcount

    def rename(self, app: str, old: str, new: str) -> int:
        """Have what one subscriber has handled count as handled by another; returns how many.

        In transactions of ``RENAME_BATCH`` rows. Called again after a failure, it goes on.
        """
        before, after = subscriber_key(app, old), subscriber_key(app, new)
        ending = before.removeprefix(app)
        renamed = self._rename(old, new) + self._rename(before, after)
        for key in self.counts():  # of other apps' events, and of those without an id
            if key.startswith(f"{app}<") and key.endswith(ending):
                renamed += self._rename(key, key.removesuffix(ending) + after.removeprefix(app))
        return renamed

    def _rename(self, old: str, new: str) -> int:
        table, renamed = self.table, 0
        columns = (table.c.event_id, table.c.processed_at)
        some = sa.select(*columns).where(table.c.subscriber == old).limit(RENAME_BATCH)
        gone = sa.delete(table).where(
            table.c.subscriber == old, table.c.event_id == sa.bindparam("event")
        )
        while True:
            with self._database.begin() as connection:
                rows = connection.execute(some).all()
                for event_id, processed_at in rows:
                    values = {"event_id": event_id, "subscriber": new}
                    insert_new(connection, table, {**values, "processed_at": processed_at})
                    connection.execute(gone, {"event": event_id})
            renamed += len(rows)
            if len(rows) < RENAME_BATCH:
                return renamed

    def count_old(self, older_than: float) -> int:
        """Return how many rows ``purge`` would delete, were it called until none is left."""
        query = sa.select(sa.func.count()).where(self._is_old(older_than))
        with self._database.begin() as connection:
            return int(connection.execute(query).scalar_one())

    def _is_old(self, older_than: float) -> sa.ColumnElement[bool]:
        return self.table.c.processed_at < database_now() - older_than


class HandlerWork:
    """The transaction of one handler, open until ``commit`` or the end of the app context."""

    def __init__(self, inbox: Inbox, session: orm.Session, handling: Handling, once: bool) -> None:
        self._inbox = inbox
        self._handling = handling
        self._once = once
        self._claimed_in = session.get_transaction()
        self._by_itself = False
        if once:
            record_of(session).work = self
            self._let_begin(session)

    def _let_begin(self, session: orm.Session) -> None:
        """Have ``with session.begin()`` work in a transaction that the inbox row has begun.

        It is how services write what views and handlers both use. Here the block is a savepoint,
        and the worker commits it together with the row.
        """
        vars(session).pop("begin", None)
        begin = session.begin

        def begin_within(nested: bool = False) -> orm.SessionTransaction:
            begun = record_of(session).work is self and session.in_transaction()
            return begin(nested=nested or begun)

        vars(session)["begin"] = begin_within

    def commit(self) -> bool:
        """Commit what the handler did, together with its inbox row and its outbox rows.

        :returns: False, with nothing committed, if the handler ended the transaction by itself
            and the message was then handled elsewhere.
        :raises DatabaseError: the connection was lost, and nobody knows what is committed.
        """
        session = self._inbox.session
        record_of(session).work = None
        try:
            if self._once and not self._still_claimed(session):
                session.rollback()
                return False
            session.commit()
        except DBAPIError as error:
            if error.connection_invalidated:
                raise DatabaseError(
                    f"The connection was lost at the commit: {error.orig}"
                ) from error
            raise
        return True

    def _still_claimed(self, session: orm.Session) -> bool:
        """Whether the inbox row will be committed with the rest.

        Where the handler has ended the transaction, the row is gone and is inserted again.
        """
        if session.get_transaction() is not self._claimed_in:
            with _asking():
                return self._inbox.claim(session, self._handling) or self._by_itself
        if not self._is_there(session):
            raise TransactionLost(
                "The database gave the handler's transaction up, at an error that was caught.",
                "Call session.rollback() there, or work in session.begin_nested().",
            )
        return True

    def _is_there(self, session: orm.Session) -> bool:
        """Look: after an error PostgreSQL takes a COMMIT and silently rolls back."""
        try:
            return self._inbox.has(session, self._handling)
        except DBAPIError as error:
            if error.connection_invalidated:
                raise
            return False

    def on_commit_by_handler(self, session: orm.Session) -> None:
        """Take the row out of what the handler commits: it has not come to its end yet.

        With the row in it, a message whose handler then failed would not be handled again.
        """
        self._by_itself = True
        self._inbox.warn_of_commit(self._handling.old_subscriber)
        if session.get_transaction() is self._claimed_in:
            self._inbox.unclaim(session, self._handling)


def _key(handling: Handling) -> dict[str, str]:
    return {"event_id": handling.event, "subscriber": handling.subscriber}


@contextmanager
def _asking() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        if isinstance(error, DataError) or type(error) is StatementError:
            raise  # it is the message's fault, whose id the database cannot take
        cause = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        if is_locked(error):
            raise InboxBusy(f"Another transaction has the inbox row locked: {cause}") from error
        raise DatabaseError(f"The inbox could not be asked: {cause}") from error
