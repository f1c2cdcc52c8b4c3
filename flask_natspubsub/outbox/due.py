"""Which rows of the outbox are due, and what they carry, no more at once than fits in memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from ..brokers.base import OutgoingMessage
from ..database.adapter import Database, Statement
from .writer import DELAYED_INDEX, PENDING

#: Bytes of payloads and headers that are read together; one row is read, however large.
BATCH_BYTES = 16 * 1024 * 1024
_OF_ROW = "id", "event_id", "subject", "ordering_key", "attempts", "size", "payload", "headers"


class DueRow(msgspec.Struct, frozen=True, gc=False):
    """A row that the relay may send."""

    id: int
    event_id: str
    message: OutgoingMessage
    ordering_key: str | None
    attempts: int


class DueRows:
    """Reads what may be sent, in the order in which it must be."""

    def __init__(self, database: Database, table: sa.Table) -> None:
        self.table = table
        self.database = database
        #: By the clock's skew, which only tests have, and the columns read.
        self._due: dict[tuple[float, tuple[str, ...]], Statement] = {}

    def due(self, partition: int, limit: int) -> list[DueRow]:
        """Read what may be sent, oldest first: ``BATCH_BYTES`` at most, or one row.

        A row whose key has an older row that is not due yet, or is still in another partition,
        waits for it; one that had to wait itself, until no older one of its key is left.
        """
        with self.database.begin() as connection:
            return self._read_due(connection, partition, limit, after=0)

    def due_behind(self, partition: int, limit: int, ahead: Sequence[DueRow]) -> list[DueRow]:
        """Read what may be sent behind rows on their way, up to the first with an ordering key.

        Nothing if others belong before those by now: a transaction that had taken its ids before
        theirs was committed since, or one of a key is due. They have to be read first, and the
        other rows of their transaction behind them.
        """
        last, count = ahead[-1].id, len(ahead)
        with self.database.begin() as connection:
            found = self._read_due(connection, partition, limit, after=last)
            # In this order: what could be seen then, can be seen now.
            first: Sequence[Any] = ()
            if found:
                first = self._find_due(
                    connection, ("id",), partition=partition, most=count, after=0
                )
        if [row_id for (row_id,) in first] != [row.id for row in ahead]:
            return []
        return list(itertools.takewhile(lambda row: row.ordering_key is None, found))

    def _read_due(
        self, connection: sa.Connection, partition: int, limit: int, *, after: int
    ) -> list[DueRow]:
        """Read rows with what they carry, as many as fit together.

        What is small comes with the row, so that all of it fits; the rest is fetched once it is
        known how much of it does.
        """
        found = _fitting(
            self._find_due(
                connection,
                _OF_ROW,
                partition=partition,
                most=limit,
                after=after,
                small=BATCH_BYTES // limit,
            )
        )
        large = [row.id for row in found if row.payload is None]
        carried = self._carried_by(connection, large) if large else {}
        return [_due_row(row, carried.get(row.id)) for row in found]

    def _carried_by(
        self, connection: sa.Connection, ids: Sequence[int]
    ) -> dict[int, tuple[bytes, str]]:
        columns = self.table.c
        query = sa.select(columns.id, columns.payload, columns.headers).where(columns.id.in_(ids))
        return {row.id: (row.payload, row.headers) for row in connection.execute(query)}

    def _find_due(
        self, connection: sa.Connection, names: tuple[str, ...], **values: int
    ) -> Sequence[Any]:
        key = self.database.skew, names
        statement = self._due.get(key)
        if statement is None:
            statement = self._due[key] = Statement(self._due_query(names))
        return statement.execute(connection, **values).all()

    def _due_query(self, names: Sequence[str]) -> sa.Select[Any]:
        partition = sa.bindparam("partition", type_=sa.Integer)
        limit = sa.bindparam("most", type_=sa.Integer)
        columns, older = self.table.c, self.table.alias("older")
        older_of_key = sa.and_(
            is_pending(older),
            older.c.ordering_key == columns.ordering_key,
            older.c.id < columns.id,
        )
        not_ours = sa.or_(older.c.available_at.is_not(None), older.c.partition != partition)
        at_once = self._pending_in(partition, names).where(
            columns.available_at.is_(None),
            sa.or_(columns.ordering_key.is_(None), ~sa.exists().where(older_of_key, not_ours)),
        )
        delayed = self._pending_in(partition, names).where(
            columns.available_at <= self.database.now(),
            sa.or_(columns.ordering_key.is_(None), ~sa.exists().where(older_of_key)),
        )
        # Two arms, each in the order of its index: to read a batch takes as long however many
        # rows are due some day, and however many are due now.
        arms = (
            at_once.order_by(columns.id).limit(limit).subquery(),
            delayed.order_by(columns.available_at, columns.id).limit(limit).subquery(),
        )
        both = sa.union_all(*(sa.select(arm) for arm in arms)).subquery()
        return sa.select(both).order_by(both.c.id).limit(limit)

    def _pending_in(self, partition: sa.BindParameter[int], names: Sequence[str]) -> sa.Select[Any]:
        table, columns = self.table, self.table.c
        size = sa.func.length(columns.payload) + sa.func.length(columns.headers)
        is_small = size <= sa.bindparam("small", type_=sa.Integer)
        read = dict(columns) | {
            "size": size.label("size"),
            "payload": sa.case((is_small, columns.payload)).label("payload"),
            "headers": sa.case((is_small, columns.headers)).label("headers"),
        }
        query = sa.select(*(read[name] for name in names)).where(
            is_pending(table),
            columns.partition == partition,
            columns.id > sa.bindparam("after", type_=sa.Integer),
        )
        for dialect in ("mysql", "mariadb"):  # it would go through all rows sent, in order of ids
            query = query.with_hint(table, f"FORCE INDEX ({DELAYED_INDEX})", dialect)
        return query


def runs(rows: Sequence[DueRow]) -> list[list[DueRow]]:
    """Cut rows, in order, so that no part has two of one ordering key."""
    found: list[list[DueRow]] = []
    keys: set[str] = set()
    for row in rows:
        if not found or row.ordering_key in keys:
            found.append([])
            keys = set()
        found[-1].append(row)
        if row.ordering_key is not None:
            keys.add(row.ordering_key)
    return found


def is_pending(table: sa.FromClause) -> sa.ColumnElement[bool]:
    """Whether a row is still to be sent."""
    return table.c.status == sa.literal_column(f"'{PENDING}'", sa.String)


def _fitting(found: Sequence[Any]) -> Sequence[Any]:
    """Return the first rows, as many as are not too large together; one at least."""
    total = 0
    for count, row in enumerate(found):
        total += row.size
        if count and total > BATCH_BYTES:
            return found[:count]
    return found


def _due_row(found: Any, carried: tuple[bytes, str] | None) -> DueRow:
    """Make a row of what was read; ``carried`` is what was fetched later."""
    row_id, event_id, subject, key, attempts, _, *small = found
    payload, headers = carried or small
    return DueRow(row_id, event_id, message_of(subject, payload, headers), key, attempts)


def message_of(subject: str, payload: bytes, headers: str) -> OutgoingMessage:
    """Make a message of the columns of a row."""
    return OutgoingMessage(subject, bytes(payload), msgspec.json.decode(headers))
