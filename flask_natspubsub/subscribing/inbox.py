"""The table of what has been handled: a handler's database effects happen once.

The row ``(event_id, subscriber)`` is inserted in the handler's own session before the handler
runs and is committed with what the handler did. A redelivery finds it; of two copies at the
same time the unique key lets one wait for the other and then skip.
"""

from __future__ import annotations

import logging
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm

from ..database import Database, Seconds, database_now, insert_new

_log = logging.getLogger("flask_natspubsub.worker")

_INFO = "natspubsub_inbox"
CLEAN_BATCH = 1000


def define_table(metadata: sa.MetaData) -> sa.Table:
    """Define ``natspubsub_inbox`` in the user's metadata, once."""
    table: sa.Table | None = metadata.info.get(_INFO)
    if table is None:
        table = metadata.info[_INFO] = sa.Table(
            "natspubsub_inbox",
            metadata,
            sa.Column("event_id", sa.String(255), primary_key=True),
            sa.Column("subscriber", sa.String(191), primary_key=True),
            sa.Column("processed_at", Seconds, nullable=False, index=True),
        )
    return table


class Inbox:
    """Begins and ends the transactions that handlers work in."""

    def __init__(self, database: Database, table: sa.Table) -> None:
        self.table = table
        self._database = database

    def begin(self, event_id: str, subscriber: str, *, once: bool) -> HandlerWork | None:
        """Begin what one handler does with one event.

        :param once: insert the inbox row; waits for another transaction that has inserted it
            and has not ended yet.
        :returns: None if ``once`` and this was handled before.
        :raises TablesMissing: the tables are not in the database.
        """
        session = self._database.session
        if once:
            self._database.require_table(session, self.table)
            if not self._insert(session, event_id, subscriber):
                session.rollback()
                return None
        return HandlerWork(self, session, event_id, subscriber, once)

    def _insert(self, session: orm.Session, event_id: str, subscriber: str) -> bool:
        table = self.table
        values = {"event_id": event_id, "subscriber": subscriber, "processed_at": database_now()}
        connection = session.connection(bind_arguments={"clause": table})
        return insert_new(connection, table, values)

    # --- for the commands and the relay

    def counts(self) -> dict[str, Any]:
        """Return the number of rows by subscriber."""
        column = self.table.c.subscriber
        query = sa.select(column, sa.func.count()).group_by(column).order_by(column)
        with self._database.begin() as connection:
            return dict(connection.execute(query).tuples().all())

    def purge(self, older_than: float, batch: int = CLEAN_BATCH) -> int:
        """Delete up to ``batch`` rows older than so many seconds; returns how many."""
        table = self.table
        old = (
            sa.select(table.c.event_id, table.c.subscriber)
            .where(table.c.processed_at < database_now() - older_than)
            .limit(batch)
        )
        with self._database.begin() as connection:
            keys = [tuple(row) for row in connection.execute(old)]
            if not keys:
                return 0
            key = sa.tuple_(table.c.event_id, table.c.subscriber)
            return connection.execute(sa.delete(table).where(key.in_(keys))).rowcount


class HandlerWork:
    """The transaction of one handler, open until ``commit`` or the end of the app context."""

    def __init__(
        self, inbox: Inbox, session: orm.Session, event_id: str, subscriber: str, once: bool
    ) -> None:
        self._inbox = inbox
        self._session = session
        self._event_id = event_id
        self._subscriber = subscriber
        self._claimed_in = session.get_transaction() if once else None

    def commit(self) -> None:
        """Commit what the handler did, together with its inbox row and its outbox rows.

        A handler that has ended the transaction itself took the row with it: it is inserted
        again after a rollback, and named after a commit, since what it committed by itself
        could be committed twice.
        """
        session = self._session
        ended = self._claimed_in is not None and session.get_transaction() is not self._claimed_in
        if ended and not self._inbox._insert(session, self._event_id, self._subscriber):
            _log.warning(
                "the handler %s commits by itself, so its inbox cannot make one of all it does: "
                "leave the commit to the worker, or use session.begin_nested()",
                self._subscriber,
            )
        session.commit()
