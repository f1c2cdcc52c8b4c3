"""Sent rows of the outbox, the durable copies of the messages in the stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from ..database.adapter import Database
from ..database.dialects import database_now
from .names import PENDING, SENT
from .tables import ID_CHUNK

#: Rows read and compared together.
PAGE = 500


@dataclass(frozen=True, slots=True)
class SentRow:
    """A sent row, with its stream and sequence from the acknowledgement.

    :param sent_at: seconds since the epoch, on the database's clock.
    """

    id: int
    event_id: str
    stream: str
    sequence: int
    sent_at: float


class SentRows:
    """Reads sent rows, newest first, and makes them pending again."""

    def __init__(self, database: Database, table: sa.Table) -> None:
        self.table = table
        self._database = database

    def highest(self, among: int) -> list[SentRow]:
        """Return, for each stream, the row with the highest sequence.

        :param among: the number of rows, those sent last, that are considered.
        """
        last = self._query(None, None).limit(among).subquery()
        place = sa.func.row_number().over(
            partition_by=last.c.stream, order_by=last.c.stream_sequence.desc()
        )
        # A row that was marked as sent by hand has no stream.
        known = sa.and_(last.c.stream.is_not(None), last.c.stream_sequence.is_not(None))
        placed = sa.select(last, place.label("place")).where(known).subquery()
        columns = [placed.c[column.name] for column in last.c]
        return self._read(sa.select(*columns).where(placed.c.place == 1))

    def pages(
        self, *, since: float | None = None, stream: str | None = None, size: int = PAGE
    ) -> Iterator[list[SentRow]]:
        """Yield pages of rows, those sent last first.

        :param since: only those sent at or after this time, seconds since the epoch.
        :param stream: only those in this stream.
        :param size: rows in a page.
        """
        query = self._query(since, stream).limit(size)
        page = self._read(query)
        while page:
            yield page
            last, columns = page[-1], self.table.c
            older = sa.or_(columns.sent_at < last.sent_at, columns.id < last.id)
            page = self._read(query.where(columns.sent_at <= last.sent_at, older))

    def _query(self, since: float | None, stream: str | None) -> sa.Select[Any]:
        columns = self.table.c
        query = sa.select(
            columns.id, columns.event_id, columns.stream, columns.stream_sequence, columns.sent_at
        ).where(self._chosen(since))
        if stream is not None:
            query = query.where(columns.stream == stream)
        return query.order_by(columns.sent_at.desc(), columns.id.desc())

    def _chosen(self, since: float | None) -> sa.ColumnElement[bool]:
        columns = self.table.c
        # A literal, because with a bound value the database does not use the partial index.
        sent: sa.ColumnElement[str] = sa.literal_column(f"'{SENT}'", sa.String)
        chosen = sa.and_(columns.status == sent, columns.sent_at.is_not(None))
        return chosen if since is None else sa.and_(chosen, columns.sent_at >= since)

    def _read(self, query: sa.Select[Any]) -> list[SentRow]:
        with self._database.begin() as connection:
            return [SentRow(*row) for row in connection.execute(query)]

    def count(self, since: float | None = None) -> int:
        """Return the number of sent rows."""
        query = sa.select(sa.func.count()).select_from(self.table).where(self._chosen(since))
        with self._database.begin() as connection:
            return int(connection.execute(query).scalar_one())

    def confirm(self, ids: Sequence[int]) -> None:
        """Record that the stream has the messages of these rows."""
        self._update(ids, {"confirmed_at": database_now()})

    def resend(self, ids: Sequence[int]) -> int:
        """Make rows pending again, with the same event ids; returns the number changed."""
        return self._update(
            ids,
            {
                "status": PENDING, "attempts": 0, "available_at": None, "last_error": None,
                "sent_at": None, "stream": None, "stream_sequence": None, "confirmed_at": None,
            },
        )  # fmt: skip

    def _update(self, ids: Sequence[int], values: dict[str, Any]) -> int:
        columns, count = self.table.c, 0
        for start in range(0, len(ids), ID_CHUNK):
            chunk = ids[start : start + ID_CHUNK]
            update = sa.update(self.table).where(columns.id.in_(chunk), columns.status == SENT)
            with self._database.begin() as connection:
                count += connection.execute(update.values(values)).rowcount
        return count
