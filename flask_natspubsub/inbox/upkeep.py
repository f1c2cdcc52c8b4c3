"""What commands and cleaning ask of the inbox: short transactions of their own."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from ..database.adapter import Database
from ..database.dialects import database_now, insert_new
from ..messages.identity import subscriber_key

CLEAN_BATCH = 1000
RENAME_BATCH = 500


class InboxUpkeep:
    """The table of the inbox, for all but the handling of messages."""

    def __init__(self, database: Database, table: sa.Table) -> None:
        self.table = table
        self._database = database

    def counts(self) -> dict[str, Any]:
        """Return the number of rows by subscriber."""
        column = self.table.c.subscriber
        query = sa.select(column, sa.func.count()).group_by(column).order_by(column)
        with self._database.begin() as connection:
            return {row[0]: int(row[1]) for row in connection.execute(query)}

    def purge(self, older_than: float, batch: int = CLEAN_BATCH) -> int:
        """Delete up to ``batch`` rows older than ``older_than`` seconds; returns the number."""
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
