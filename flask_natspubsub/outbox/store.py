"""The relay's side of the outbox: which rows are due, and marking what became of them.

No more is read at once than fits in memory; no transaction waits for the network.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from ..brokers.base import Result, StoredAck
from ..database.adapter import SCHEMA_MAP, Database, Statement
from ..database.dialects import database_now, table_name
from ..database.leases import Lease
from ..errors import PublishError
from ..messages.message import Message
from ..text import printable
from .names import PARKED, PENDING
from .tables import DELAYED_INDEX, OutboxTables, is_pending
from .upkeep import OutboxUpkeep

#: Bytes of payloads and headers that are read together; one row is read, however large.
BATCH_BYTES = 16 * 1024 * 1024
_OF_ROW = "id", "event_id", "subject", "ordering_key", "attempts", "size", "payload", "headers"


class DueRow(Message, frozen=True, gc=False):
    """A row that the relay may send."""

    id: int
    event_id: str
    ordering_key: str | None
    attempts: int


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

    def add(self, rows: Sequence[DueRow], results: Sequence[Result]) -> set[str | None]:
        """Take in the results of rows; returns the keys of which none may follow."""
        stuck: set[str | None] = set()
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, StoredAck):
                self.sent[row.id] = result
                continue
            self.errors[row.id] = row, result
            stuck.add(row.ordering_key)
        return stuck - {None}  # rows without a key wait for none


class OutboxStore(OutboxUpkeep):
    """Reads what may be sent, in the order in which it must be, and marks what was sent."""

    def __init__(self, database: Database, tables: OutboxTables) -> None:
        super().__init__(database, tables)
        #: By the clock's skew, which only tests have, and the columns read.
        self._due: dict[tuple[float, tuple[str, ...]], Statement] = {}
        #: By the dialect, where no other schema takes the place of the table's.
        self._marks: dict[str, sa.TextClause] = {}

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
        dialect, schemas = connection.dialect, connection.get_execution_options().get(SCHEMA_MAP)
        mark = None if schemas else self._marks.get(dialect.name)
        if mark is None:
            now = database_now().compile(dialect=dialect)
            name = table_name(connection, self.table)
            mark = sa.text(_MARK_SENT[dialect.name].format(name, now=now))
            if not schemas:
                self._marks[dialect.name] = mark
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
    data, headers = carried or small
    return DueRow(
        subject, bytes(data), msgspec.json.decode(headers), row_id, event_id, key, attempts
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
