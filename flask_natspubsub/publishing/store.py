"""The relay's and the commands' side of the outbox: short transactions of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from ..brokers.base import OutgoingMessage, StoredAck
from ..database import Database, Lease, Leases, database_now
from .outbox import PARKED, PENDING, SENT, OutboxTables

LEASE_SECONDS = 10.0
CLEAN_BATCH = 1000


@dataclass(frozen=True, slots=True)
class DueRow:
    """A row that the relay may send."""

    id: int
    event_id: str
    message: OutgoingMessage
    ordering_key: str | None
    attempts: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that was not sent.

    :param wait: seconds until it is tried again.
    :param refused: the server said no, which counts an attempt; temporary faults do not.
    :param park: it is not tried again until somebody asks for it.
    """

    error: str
    wait: float
    refused: bool
    park: bool


class OutboxStore:
    """The relay's and the commands' side of the table."""

    def __init__(self, database: Database, tables: OutboxTables) -> None:
        self.leases = Leases(database, tables.lease, LEASE_SECONDS)
        self.table = tables.outbox
        self._database = database

    def due(self, partition: int, limit: int) -> list[DueRow]:
        """Read what may be sent, oldest first.

        A row whose key has an older row that is not due yet waits for it.
        """
        table, older = self.table, self.table.alias("older")
        now = self._database.now()
        blocked = (
            sa.select(older.c.id)
            .where(
                older.c.status == PENDING,
                older.c.ordering_key == table.c.ordering_key,
                older.c.id < table.c.id,
                older.c.available_at > now,
            )
            .exists()
        )
        columns = table.c
        query = (
            sa.select(
                columns.id, columns.event_id, columns.subject, columns.payload,
                columns.headers, columns.ordering_key, columns.attempts,
            )
            .where(
                columns.status == PENDING,
                columns.partition == partition,
                sa.or_(columns.available_at.is_(None), columns.available_at <= now),
                sa.or_(columns.ordering_key.is_(None), ~blocked),
            )
            .order_by(columns.id)
            .limit(limit)
        )  # fmt: skip
        with self._database.begin() as connection:
            return [
                DueRow(
                    row.id,
                    row.event_id,
                    _message(row),
                    row.ordering_key,
                    row.attempts,
                )
                for row in connection.execute(query)
            ]

    def mark(
        self,
        lease: Lease,
        sent: Mapping[int, StoredAck],
        failed: Mapping[int, Failure],
    ) -> bool:
        """Write the outcome of a batch in one transaction, fenced by the lease.

        :returns: False, with nothing written, if the lease is lost.
        """
        with self._database.begin() as connection:
            if not self.leases.renew_in(connection, lease):
                return False
            for stream, rows in _by_stream(sent).items():
                statement = sa.text(_MARK_SENT[connection.dialect.name].format(self.table.fullname))
                connection.execute(statement, {"stream": stream, "rows": rows})
            for row_id, failure in failed.items():
                connection.execute(self._failure(row_id, failure))
        return True

    def _failure(self, row_id: int, failure: Failure) -> sa.Update:
        return (
            sa.update(self.table)
            .where(self.table.c.id == row_id, self.table.c.status == PENDING)
            .values(
                last_error=failure.error[:1024],
                attempts=self.table.c.attempts + (1 if failure.refused else 0),
                available_at=self._database.now() + failure.wait,
                status=PARKED if failure.park else PENDING,
            )
        )

    def pending_messages(self) -> list[OutgoingMessage]:
        """Return what is still to be sent, due or not, oldest first."""
        columns = self.table.c
        query = (
            sa.select(columns.subject, columns.payload, columns.headers)
            .where(columns.status == PENDING)
            .order_by(columns.id)
        )
        with self._database.begin() as connection:
            return [_message(row) for row in connection.execute(query)]

    # --- for the commands and health

    def counts(self) -> dict[str, Any]:
        """Return the number of rows of each status, and the age of the oldest pending one."""
        table = self.table
        by_status = sa.select(table.c.status, sa.func.count()).group_by(table.c.status)
        with self._database.begin() as connection:
            found: dict[str, int] = dict(connection.execute(by_status).tuples().all())
        return {status: found.get(status, 0) for status in (PENDING, SENT, PARKED)} | {
            "oldest_pending_seconds": self.oldest_pending_age()
        }

    def oldest_pending_age(self) -> float | None:
        """Return how long the oldest due row has been waiting, in seconds; None if none is."""
        table = self.table
        age = sa.select(database_now() - table.c.created_at).where(
            table.c.status == PENDING,
            sa.or_(table.c.available_at.is_(None), table.c.available_at <= database_now()),
        )
        with self._database.begin() as connection:
            value = connection.execute(age.order_by(table.c.id).limit(1)).scalar()
        return None if value is None else max(0.0, float(value))

    def list(self, status: str | None, limit: int, after: int = 0) -> list[dict[str, Any]]:
        """Return rows without their payload, oldest first."""
        table = self.table
        columns = [column for column in table.c if column.name not in ("payload", "headers")]
        query = sa.select(*columns).where(table.c.id > after).order_by(table.c.id).limit(limit)
        if status is not None:
            query = query.where(table.c.status == status)
        with self._database.begin() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def retry(self, ids: Sequence[int] | None = None) -> int:
        """Make parked rows, and rows that are backing off, due at once; returns how many."""
        table = self.table
        waiting = sa.and_(table.c.status == PENDING, table.c.attempts > 0)
        where = sa.or_(table.c.status == PARKED, waiting)
        if ids is not None:
            where = sa.and_(where, table.c.id.in_(ids))
        statement = (
            sa.update(table).where(where).values(status=PENDING, attempts=0, available_at=None)
        )
        with self._database.begin() as connection:
            return connection.execute(statement).rowcount

    def purge(self, status: str, older_than: float, batch: int = CLEAN_BATCH) -> int:
        """Delete up to ``batch`` rows of a status that are older than so many seconds.

        :returns: how many; fewer than ``batch`` means that there are no more.
        """
        table = self.table
        age = table.c.sent_at if status == SENT else table.c.created_at
        old = (
            sa.select(table.c.id)
            .where(table.c.status == status, age < database_now() - older_than)
            .limit(batch)
        )
        with self._database.begin() as connection:
            ids = [row.id for row in connection.execute(old)]
            if not ids:
                return 0
            delete = sa.delete(table).where(table.c.id.in_(ids), table.c.status == status)
            return connection.execute(delete).rowcount


def _message(row: Any) -> OutgoingMessage:
    return OutgoingMessage(row.subject, bytes(row.payload), json.loads(row.headers))


def _by_stream(sent: Mapping[int, StoredAck]) -> dict[str, str]:
    rows: dict[str, list[list[int]]] = {}
    for row_id, ack in sent.items():
        rows.setdefault(ack.stream, []).append([row_id, ack.sequence])
    return {stream: json.dumps(pairs) for stream, pairs in rows.items()}


# One statement for a whole batch, with one JSON parameter whatever its size: as many UPDATEs as
# rows would cost a round trip each, and a CASE of five hundred arms is parsed anew each time.
_MARK_SENT = {
    "sqlite": "UPDATE {0} SET status = 'sent', stream = :stream, stream_sequence = d.seq,"
    " sent_at = ((julianday('now') - 2440587.5) * 86400.0)"
    " FROM (SELECT json_extract(value, '$[0]') AS id, json_extract(value, '$[1]') AS seq"
    # The plus keeps SQLite from using the index of pending rows, all of them, for the join.
    " FROM json_each(:rows)) AS d WHERE {0}.id = d.id AND +{0}.status = 'pending'",
    "postgresql": "UPDATE {0} SET status = 'sent', stream = :stream, stream_sequence = d.seq,"
    " sent_at = EXTRACT(EPOCH FROM clock_timestamp())"
    " FROM (SELECT CAST(value->>0 AS bigint) AS id, CAST(value->>1 AS bigint) AS seq"
    " FROM json_array_elements(CAST(:rows AS json))) AS d"
    " WHERE {0}.id = d.id AND {0}.status = 'pending'",
    "mysql": "UPDATE {0} JOIN JSON_TABLE(:rows, '$[*]' COLUMNS"
    " (id BIGINT PATH '$[0]', seq BIGINT PATH '$[1]')) AS d ON {0}.id = d.id"
    " SET status = 'sent', stream = :stream, stream_sequence = d.seq,"
    " sent_at = UNIX_TIMESTAMP(SYSDATE(6)) WHERE {0}.status = 'pending'",
}
_MARK_SENT["mariadb"] = _MARK_SENT["mysql"]
