"""The relay's and the commands' side of the outbox: short transactions of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from ..brokers.base import OutgoingMessage, StoredAck
from ..database.adapter import Database
from ..database.dialects import database_now, table_name
from ..database.leases import Lease, Leases
from ..errors import PublishError
from ..text import printable
from .due import DueRow, DueRows, is_pending, message_of
from .sent import SentRows
from .streams import StreamRecords
from .writer import PARKED, PENDING, SENT, OutboxTables

LEASE_SECONDS = 10.0
CLEAN_BATCH = 1000
#: The lease of a partition is called this and its number.
PARTITION = "outbox/"


class Failure(msgspec.Struct, frozen=True):
    """A row that was not sent.

    :param wait: seconds until it is tried again.
    :param refused: the server said no, which counts an attempt; temporary faults do not.
    :param park: it is not tried again until somebody asks for it.
    """

    error: str
    wait: float
    refused: bool
    park: bool


class Published(msgspec.Struct):
    """What has become of rows, by their ids."""

    sent: dict[int, StoredAck]
    errors: dict[int, tuple[DueRow, PublishError]]

    def add(
        self, rows: Sequence[DueRow], results: Sequence[StoredAck | PublishError | None]
    ) -> set[str | None]:
        """Take in the results of rows; returns the keys of which none may follow."""
        stuck: set[str | None] = set()
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, StoredAck):
                self.sent[row.id] = result
                continue
            error = result or PublishError("The broker's thread did not answer.", outcome="unknown")
            self.errors[row.id] = row, error
            stuck.add(row.ordering_key)
        return stuck - {None}  # rows without a key wait for none


class OutboxStore(DueRows):
    """The relay's and the commands' side of the table."""

    def __init__(self, database: Database, tables: OutboxTables) -> None:
        super().__init__(database, tables.outbox)
        self.leases = Leases(database, tables.lease, LEASE_SECONDS)
        self.sent = SentRows(database, tables.outbox)
        self.streams = StreamRecords(database, tables.stream)
        #: By the dialect and the name of the table.
        self._marks: dict[tuple[str, str], sa.TextClause] = {}

    def mark(
        self,
        lease: Lease,
        sent: Mapping[int, StoredAck],
        failed: Mapping[int, Failure],
    ) -> bool:
        """Write the outcome of a batch in one transaction, fenced by the lease.

        :returns: False, with nothing written, if the lease is lost.
        """
        with self.database.begin() as connection:
            if not self.leases.renew_in(connection, lease):
                return False
            for stream, rows in _by_stream(sent).items():
                connection.execute(self._mark_sent(connection), {"stream": stream, "rows": rows})
            if failed:
                failures = [_failure(row_id, failure) for row_id, failure in failed.items()]
                connection.execute(self._mark_failed(), failures)
        return True

    def _mark_sent(self, connection: sa.Connection) -> sa.TextClause:
        dialect, name = connection.dialect, table_name(connection, self.table)
        mark = self._marks.get((dialect.name, name))
        if mark is None:
            now = database_now().compile(dialect=dialect)
            mark = self._marks[dialect.name, name] = sa.text(
                _MARK_SENT[dialect.name].format(name, now=now)
            )
        return mark

    def _mark_failed(self) -> sa.Update:
        columns = self.table.c
        return (
            sa.update(self.table)
            .where(columns.id == sa.bindparam("row_id"), columns.status == PENDING)
            .values(
                last_error=sa.bindparam("error"),
                attempts=columns.attempts + sa.bindparam("attempt"),
                available_at=self.database.now() + sa.bindparam("wait"),
                status=sa.bindparam("new_status"),
            )
        )

    def pending_messages(self) -> list[OutgoingMessage]:
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
        stray = _is_pending_by_index(self.table), columns.partition >= partitions
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

    # --- for the commands and health

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
            query = query.where(table.c.status == _literal(status))
        with self.database.begin() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def retry(self, ids: Sequence[int] | None = None) -> int:
        """Make parked rows, and rows that are backing off, due at once; returns how many."""
        table = self.table
        # What has failed before has a time at which it is due again.
        waiting = sa.and_(
            is_pending(table), table.c.available_at.is_not(None), table.c.attempts > 0
        )
        where = sa.or_(table.c.status == _literal(PARKED), waiting)
        if ids is not None:
            where = sa.and_(where, table.c.id.in_(ids))
        statement = (
            sa.update(table).where(where).values(status=PENDING, attempts=0, available_at=None)
        )
        with self.database.begin() as connection:
            return connection.execute(statement).rowcount

    def purge(self, status: str, older_than: float, batch: int = CLEAN_BATCH) -> int:
        """Delete up to ``batch`` rows of a status that are older than so many seconds.

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
        return sa.and_(columns.status == _literal(status), age < database_now() - older_than)


def _literal(status: str) -> sa.ColumnElement[str]:
    """Write it into the text of the query: a bound value does not show that an index fits."""
    return sa.literal(status, sa.String, literal_execute=True)


def _is_pending_by_index(table: sa.FromClause) -> sa.ColumnElement[bool]:
    """Say it in such a way that the index of what is delayed, and that of what is not, fit."""
    at = table.c.available_at
    return sa.or_(
        sa.and_(is_pending(table), at.is_(None)), sa.and_(is_pending(table), at.is_not(None))
    )


def _failure(row_id: int, failure: Failure) -> dict[str, Any]:
    return {
        "row_id": row_id,
        # Neither a NUL nor half a surrogate pair is text for every database.
        "error": printable(failure.error[:1024]),
        "attempt": int(failure.refused),
        "wait": failure.wait,
        "new_status": PARKED if failure.park else PENDING,
    }


def _by_stream(sent: Mapping[int, StoredAck]) -> dict[str, str]:
    rows: dict[str, list[list[int]]] = {}
    for row_id, ack in sent.items():
        rows.setdefault(ack.stream, []).append([row_id, ack.sequence])
    return {stream: msgspec.json.encode(pairs).decode() for stream, pairs in rows.items()}


# One statement for a whole batch, with one JSON parameter whatever its size: as many UPDATEs as
# rows would cost a round trip each, and a CASE of five hundred arms is parsed anew each time.
# The empty string keeps the index of pending rows, all of them, from being used for the join.
_MARK_SENT = {
    "sqlite": "UPDATE {0} SET status = 'sent', stream = :stream, stream_sequence = d.seq,"
    " sent_at = {now}"
    " FROM (SELECT json_extract(value, '$[0]') AS id, json_extract(value, '$[1]') AS seq"
    " FROM json_each(:rows)) AS d WHERE {0}.id = d.id AND {0}.status || '' = 'pending'",
    "postgresql": "UPDATE {0} SET status = 'sent', stream = :stream, stream_sequence = d.seq,"
    " sent_at = {now}"
    " FROM (SELECT CAST(value->>0 AS bigint) AS id, CAST(value->>1 AS bigint) AS seq"
    " FROM json_array_elements(CAST(:rows AS json))) AS d"
    " WHERE {0}.id = d.id AND {0}.status || '' = 'pending'",
    "mysql": "UPDATE {0} JOIN JSON_TABLE(:rows, '$[*]' COLUMNS"
    " (id BIGINT PATH '$[0]', seq BIGINT PATH '$[1]')) AS d ON {0}.id = d.id"
    " SET status = 'sent', stream = :stream, stream_sequence = d.seq,"
    " sent_at = {now} WHERE {0}.status = 'pending'",
}
_MARK_SENT["mariadb"] = _MARK_SENT["mysql"]
