"""What commands, health and cleaning ask of the outbox: short transactions of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from ..database.adapter import Database
from ..database.dialects import database_now
from ..database.leases import Leases
from ..messages.message import Message
from .names import PARKED, PARTITION, PENDING, SENT
from .sent import SentRows
from .streams import StreamRecords
from .tables import OutboxTables, has_status, is_pending, is_pending_by_index

LEASE_SECONDS = 10.0
CLEAN_BATCH = 1000


class OutboxUpkeep:
    """The table of the outbox, for all but the relay's sending."""

    def __init__(self, database: Database, tables: OutboxTables) -> None:
        self.table = tables.outbox
        self.database = database
        self.leases = Leases(database, tables.lease, LEASE_SECONDS)
        self.sent = SentRows(database, tables.outbox)
        self.streams = StreamRecords(database, tables.stream)

    def pending_messages(self) -> list[Message]:
        """Return what is still to be sent, due or not, oldest first."""
        columns = self.table.c
        query = (
            sa.select(columns.subject, columns.payload, columns.headers)
            .where(is_pending(self.table))
            .order_by(columns.id)
        )
        with self.database.begin() as connection:
            return [message_of(*row) for row in connection.execute(query)]

    def adopt(self, partitions: int) -> int:
        """Move pending rows out of partitions that nobody relays; returns how many.

        They were written by a process that has a higher NATSPUBSUB_OUTBOX_PARTITIONS: one that
        has not learnt of a lower one, or the first of a deploy that raises it.
        """
        columns = self.table.c
        stray = is_pending_by_index(self.table), columns.partition >= partitions
        with self.database.begin() as connection:
            found = connection.execute(sa.select(columns.partition).where(*stray).limit(1)).first()
        if found is None:
            return 0
        relayed = [
            int(name.removeprefix(PARTITION))
            for name in self.leases.held()
            if name.startswith(PARTITION)
        ]
        rows = sa.select(columns.id).where(*stray, columns.partition.not_in(relayed))
        with self.database.begin() as connection:
            ids = [row.id for row in connection.execute(rows.limit(CLEAN_BATCH))]
            if not ids:
                return 0
            move = sa.update(self.table).where(columns.id.in_(ids), columns.status == PENDING)
            place = columns.partition % partitions
            return connection.execute(move.values(partition=place)).rowcount

    def counts(self) -> dict[str, Any]:
        """Return the number of rows of each status, and the age of the oldest pending one."""
        table = self.table
        by_status = sa.select(table.c.status, sa.func.count()).group_by(table.c.status)
        with self.database.begin() as connection:
            found = {row[0]: int(row[1]) for row in connection.execute(by_status)}
        return {status: found.get(status, 0) for status in (PENDING, SENT, PARKED)} | {
            "oldest_pending_seconds": self.oldest_pending_age()
        }

    def oldest_pending_age(self) -> float | None:
        """Return how long the oldest due row has been waiting, in seconds; None if none is.

        One look at the index for each partition that has rows, however many rows those are.
        """
        columns, now = self.table.c, self.database.now()
        age = database_now() - columns.created_at
        pending = sa.select(columns.partition, age).where(is_pending(self.table)).limit(1)
        first_of = (
            pending.where(columns.available_at.is_(None)).order_by(columns.partition, columns.id),
            pending.where(columns.available_at <= now).order_by(
                columns.partition, columns.available_at
            ),
        )
        ages: list[float] = []
        with self.database.begin() as connection:
            for oldest in first_of:
                partition = -1
                while row := connection.execute(
                    oldest.where(columns.partition > partition)
                ).first():
                    partition, seconds = row
                    ages.append(max(0.0, float(seconds)))
        return max(ages, default=None)

    def list(self, status: str | None, limit: int, after: int = 0) -> list[dict[str, Any]]:
        """Return rows without their payload, oldest first."""
        table = self.table
        columns = [column for column in table.c if column.name not in ("payload", "headers")]
        query = sa.select(*columns).where(table.c.id > after).order_by(table.c.id).limit(limit)
        if status is not None:
            query = query.where(has_status(table, status))
        with self.database.begin() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def retry(self, ids: Sequence[int] | None = None) -> int:
        """Make parked rows, and rows that are backing off, due at once; returns how many."""
        table = self.table
        # What has failed before has a time at which it is due again.
        waiting = sa.and_(
            is_pending(table), table.c.available_at.is_not(None), table.c.attempts > 0
        )
        where = sa.or_(has_status(table, PARKED), waiting)
        if ids is not None:
            where = sa.and_(where, table.c.id.in_(ids))
        statement = (
            sa.update(table).where(where).values(status=PENDING, attempts=0, available_at=None)
        )
        with self.database.begin() as connection:
            return connection.execute(statement).rowcount

    def purge(self, status: str, older_than: float, batch: int = CLEAN_BATCH) -> int:
        """Delete up to ``batch`` rows of a status that are older than ``older_than`` seconds.

        :returns: how many; fewer than ``batch`` means that there are no more.
        """
        table = self.table
        old = sa.select(table.c.id).where(self._is_old(status, older_than)).limit(batch)
        with self.database.begin() as connection:
            ids = [row.id for row in connection.execute(old)]
            if not ids:
                return 0
            delete = sa.delete(table).where(table.c.id.in_(ids), table.c.status == status)
            return connection.execute(delete).rowcount

    def count_old(self, status: str, older_than: float) -> int:
        """Return how many rows ``purge`` would delete, were it called until none is left."""
        query = sa.select(sa.func.count()).where(self._is_old(status, older_than))
        with self.database.begin() as connection:
            return int(connection.execute(query).scalar_one())

    def _is_old(self, status: str, older_than: float) -> sa.ColumnElement[bool]:
        columns = self.table.c
        age = columns.sent_at if status == SENT else columns.created_at
        return sa.and_(has_status(self.table, status), age < database_now() - older_than)


def message_of(subject: str, data: bytes, headers: str) -> Message:
    """Make a message of the columns of a row."""
    return Message(subject, bytes(data), msgspec.json.decode(headers))
