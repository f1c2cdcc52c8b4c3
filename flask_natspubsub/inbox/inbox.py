"""The table of what has been handled: a handler's database effects happen once.

The row of an event and a subscriber, as ``messages.identity`` names them, is inserted in the
handler's own session before the handler runs and is committed with what the handler did. A
redelivery finds it; of two copies at the same time the unique key lets one wait for the other and
then skip.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.exc import DataError, DBAPIError, SQLAlchemyError, StatementError

from ..database.adapter import Database
from ..database.dialects import Identifier, Seconds
from ..database.session_events import FAILED, RECORD, SessionRecord
from ..errors import DatabaseError, InboxBusy, NatsPubsubError
from ..messages.identity import Handling
from ..text import get_logger
from .claims import Claims, is_locked
from .takeover import Takeover
from .upkeep import InboxUpkeep

_log = get_logger("flask_natspubsub.worker")

_INFO = "natspubsub_inbox"


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


class Inbox(InboxUpkeep):
    """Begins and ends the transactions that handlers work in.

    :param leases: the table of leases, in which ``Takeover`` keeps until when old rows count.
    """

    def __init__(self, database: Database, table: sa.Table, leases: sa.Table) -> None:
        super().__init__(database, table)
        self._claims = Claims(table)
        self._takeover = Takeover(table, leases, self._claims)
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
        session, connection = self._database.session, None
        if once:
            with _asking():
                connection = self.claim(session, handling)
            if connection is None:
                session.rollback()
                return None
        return HandlerWork(self, session, handling, connection)

    @property
    def session(self) -> orm.Session:
        """The session of the application context, which may not be the one it had before."""
        return self._database.session

    def claim(self, session: orm.Session, handling: Handling) -> sa.Connection | None:
        """Insert the row in the session's transaction.

        :returns: the connection that has it; None if the row was there already.
        """
        database, takeover = self._database, self._takeover
        if self.table.name not in database.known_tables:
            database.require_table(session, self.table)
        key = _key(handling)
        with database.in_place(session, self.table) as connection:
            connection.info.pop(FAILED, None)
            new = self._claims.insert(connection, key)
            if new and takeover.is_on is not False:
                new = takeover.claim(connection, handling)
            return connection if new else None

    def unclaim(self, session: orm.Session, handling: Handling) -> None:
        """Delete the row in the session's transaction."""
        with self._database.in_place(session, self.table) as connection:
            connection.execute(self._forget, _key(handling))
            self._takeover.unclaim(connection, handling)

    def has(self, session: orm.Session, handling: Handling) -> bool:
        """Whether the session's transaction still has the row."""
        with self._database.in_place(session, self.table) as connection:
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


class HandlerWork:
    """The transaction of one handler, open until ``commit`` or the end of the app context."""

    def __init__(
        self,
        inbox: Inbox,
        session: orm.Session,
        handling: Handling,
        connection: sa.Connection | None,
    ) -> None:
        self._inbox = inbox
        self._handling = handling
        #: Where the inbox row is; None if there is none.
        self._connection = connection
        self._claimed_in = session.get_transaction()
        self._by_itself = False
        if connection is not None:
            record = session.info.setdefault(RECORD, SessionRecord())
            record.work = self
            self._let_begin(session)

    def _let_begin(self, session: orm.Session) -> None:
        """Have ``with session.begin()`` work in a transaction that the inbox row has begun.

        It is how services write what views and handlers both use. Here the block is a savepoint,
        and the worker commits it together with the row.
        """
        vars(session).pop("begin", None)
        begin = session.begin

        def begin_within(nested: bool = False) -> orm.SessionTransaction:
            begun = session.info[RECORD].work is self and session.in_transaction()
            return begin(nested=nested or begun)

        vars(session)["begin"] = begin_within

    def commit(self) -> bool:
        """Commit what the handler did, together with its inbox row and its outbox rows.

        :returns: False, with nothing committed, if the handler ended the transaction by itself
            and the message was then handled elsewhere.
        :raises DatabaseError: the connection was lost, and nobody knows what is committed.
        """
        session = self._inbox.session
        record = session.info.get(RECORD)
        if record is not None:
            record.work = None
        try:
            if self._connection is not None and not self._still_claimed(session, self._connection):
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

    def _still_claimed(self, session: orm.Session, connection: sa.Connection) -> bool:
        """Whether the inbox row will be committed with the rest.

        Where the handler has ended the transaction, the row is gone and is inserted again.
        """
        if session.get_transaction() is not self._claimed_in:
            with _asking():
                claimed = self._inbox.claim(session, self._handling) is not None
            return claimed or self._by_itself
        # After an error PostgreSQL takes a COMMIT and silently rolls back: then, and only then,
        # look.
        if FAILED in connection.info and not self._is_there(session):
            raise TransactionLost(
                "The database gave the handler's transaction up, at an error that was caught.",
                "Call session.rollback() there, or work in session.begin_nested().",
            )
        return True

    def _is_there(self, session: orm.Session) -> bool:
        """Look for the row; False also if the transaction can do no more."""
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
