"""Writes rows of the outbox into the caller's transaction, in the user's own session.

``OutboxWriter`` is what publishing uses; the relay's side is ``store``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import orm

from ..database.adapter import Database
from ..database.dialects import insert_or_leave
from ..database.session_events import expect_commit, require_open
from ..publishing.draft import Prepared
from ..text import get_logger
from .tables import ID_CHUNK, OutboxTables

_log = get_logger("flask_natspubsub")

#: Limit of places that are warned of for a forgotten commit, one warning each.
_MAX_PLACES = 100


class OutboxWriter:
    """Adds rows to the caller's transaction.

    :param partitions: over how many partitions the rows are spread.
    :param committed: called after a transaction with rows in it has been committed; it must
        not wait or raise. A wake-up may be lost: the relay finds the rows by polling.
    """

    def __init__(
        self,
        database: Database,
        tables: OutboxTables,
        partitions: int,
        committed: Callable[[], None],
    ) -> None:
        self._database = database
        self._tables = tables
        self._partitions = partitions
        self._on_commit = committed
        self._warned = False
        self._forgotten: set[str] = set()

    def add(self, prepared: Sequence[Prepared]) -> list[bool]:
        """Add rows to the session; they are inserted by its next flush and follow savepoints.

        A message whose event id the caller chose is left out if the outbox has it already, also
        if another transaction turns out to be the first to commit it.

        :returns: for each message, whether it was there.
        :raises PublishError: the session is just ending.
        :raises TablesMissing: the tables are not in the database.
        """
        session = self._database.session
        if not (session.is_active and session.in_transaction()):
            require_open(session)
        if self._tables.outbox.name not in self._database.known_tables:
            self._database.require_table(session, self._tables.outbox)
        seen = self._existing(session, {item.event_id for item in prepared if item.named})
        known, new = [], []
        for item in prepared:
            known.append(item.event_id in seen)
            if not known[-1]:
                new.append(item)
                seen.add(item.event_id)
        if _is_flushing(session):
            self.insert(session, new)
        elif new:
            for item in new:
                row = self._tables.row()
                row.event_id, row.values, row.named = item.event_id, self._values(item), item.named
                session.add(row)
            expect_commit(session, self, waiting=True)
        return known

    def insert(self, session: orm.Session, prepared: Sequence[Prepared]) -> None:
        """Insert rows at once, for those who are inside a flush already."""
        if self._tables.outbox.name not in self._database.known_tables:
            self._database.require_table(session, self._tables.outbox)
        if prepared:
            named = any(item.named for item in prepared)
            self._insert(session, [self._values(item) for item in prepared], or_leave=named)
            expect_commit(session, self, waiting=False)

    def insert_waiting(self, session: orm.Session) -> None:
        """Insert the rows that were added to the session since its last flush.

        The session would insert them into the schema of its tenant; and its flush would fail,
        and with it the user's own rows, at an event id that another transaction has committed
        meanwhile.
        """
        rows = [row for row in session.new if isinstance(row, self._tables.row)]
        if rows:  # none, if their savepoint was rolled back
            named = any(row.named for row in rows)
            self._insert(session, [row.values for row in rows], or_leave=named)
        for row in rows:
            session.expunge(row)

    def _insert(
        self, session: orm.Session, rows: Sequence[dict[str, Any]], *, or_leave: bool
    ) -> None:
        table = self._tables.outbox
        by_the_database = any(isinstance(row["available_at"], sa.ClauseElement) for row in rows)
        with self._database.in_place(session, table) as connection:
            statement = sa.insert(table)
            if or_leave:
                statement = insert_or_leave(connection.dialect, table, table.c.event_id)
            if by_the_database:
                for row in rows:  # an expression: one by one
                    connection.execute(statement.values(**row))
            elif rows:
                connection.execute(statement, rows)

    def _existing(self, session: orm.Session, event_ids: set[str]) -> set[str]:
        """Return those event ids that the session or the table has already."""
        if not event_ids:
            return set()
        rows: list[Any] = [row for row in session.new if isinstance(row, self._tables.row)]
        found = event_ids & {row.event_id for row in rows}
        left, column = sorted(event_ids - found), self._tables.outbox.c.event_id
        with self._database.in_place(session, column.table) as connection:
            for start in range(0, len(left), ID_CHUNK):
                query = sa.select(column).where(column.in_(left[start : start + ID_CHUNK]))
                found.update(connection.scalars(query))
        return found

    def _values(self, item: Prepared) -> dict[str, Any]:
        spread_by = item.ordering_key or item.event_id
        due: Any = item.available_at
        if item.delay is not None:
            due = self._database.now() + item.delay
        return {
            "event_id": item.event_id,
            "subject": item.subject,
            "headers": msgspec.json.encode(item.headers).decode(),
            "payload": item.data,
            "ordering_key": item.ordering_key,
            "partition": zlib.crc32(spread_by.encode()) % self._partitions,
            "available_at": due,
        }

    def committed(self, session: orm.Session, flushed: set[type]) -> None:
        """Hear that the session has committed a transaction with rows in it."""
        self._on_commit()
        if self._warned or not self._database.has_several_binds:
            return
        if self._database.has_other_binds(session, flushed):
            self._warned = True
            _log.warning(
                "a transaction wrote to another database than the one of the outbox: the two "
                "commit one after the other, so a crash in between keeps the rows and loses the "
                "event, or the reverse. NATSPUBSUB_BIND_KEY says in which one the outbox is"
            )

    def forgotten(self, place: str) -> None:
        """Warn, once for each place, of events that nobody has committed."""
        if place not in self._forgotten and len(self._forgotten) < _MAX_PLACES:
            self._forgotten.add(place)
            _log.warning(
                "%s: published through the outbox, and the session ended without a commit: the "
                "event was dropped, as was all else in that transaction. Commit the session; or "
                "roll it back, if that is meant",
                place,
            )


def _is_flushing(session: orm.Session) -> bool:
    """Whether the session flushes just now, when it is too late for it to take a row.

    There is no public way to ask; should this one go, the row waits for the next flush, if
    there is one, and SQLAlchemy warns.
    """
    return bool(getattr(session, "_flushing", False))
