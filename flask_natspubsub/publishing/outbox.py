"""The table of events to send: written in the caller's transaction, read by the relay.

A row holds the encoded envelope, so what is sent is what was committed. ``OutboxWriter`` is
what publishing uses, inside the user's session; the relay's side is ``store``.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import sqlalchemy as sa
from sqlalchemy import event, orm

from ..database import (
    BigInt,
    Blob,
    Database,
    LongText,
    Seconds,
    make_lease_table,
)
from .draft import Prepared

PENDING, SENT, PARKED = "pending", "sent", "parked"
TABLE = "natspubsub_outbox"
_INFO = "natspubsub_outbox"
_WROTE = "natspubsub_wrote"


class OutboxRow:
    """A row as the session sees it; mapped to the table of each metadata."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)


@dataclass(frozen=True, slots=True)
class OutboxTables:
    """The tables in one metadata, and the class that maps to the outbox."""

    outbox: sa.Table
    lease: sa.Table
    row: type[OutboxRow]


def define_tables(metadata: sa.MetaData) -> OutboxTables:
    """Define the tables in the user's metadata, once."""
    tables: OutboxTables | None = metadata.info.get(_INFO)
    if tables is None:
        outbox, lease = _outbox_table(metadata), make_lease_table(metadata)
        row = type("NatsPubsubOutbox", (OutboxRow,), {})
        orm.registry(metadata=metadata).map_imperatively(row, outbox)
        tables = metadata.info[_INFO] = OutboxTables(outbox, lease, row)
    return tables


def _outbox_table(metadata: sa.MetaData) -> sa.Table:
    pending = sa.text("status = 'pending'")
    sent = sa.text("status = 'sent'")
    return sa.Table(
        TABLE,
        metadata,
        sa.Column("id", BigInt, primary_key=True, autoincrement=True),
        sa.Column("event_id", sa.String(255), nullable=False, unique=True),
        sa.Column("subject", sa.String(255), nullable=False),
        sa.Column("headers", LongText, nullable=False),
        sa.Column("payload", Blob, nullable=False),
        sa.Column("ordering_key", sa.String(255)),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("status", sa.String(8), nullable=False, default=PENDING),
        sa.Column("available_at", Seconds),
        sa.Column("attempts", sa.Integer, nullable=False, default=0),
        sa.Column("last_error", sa.String(1024)),
        sa.Column("created_at", Seconds, nullable=False, default=time.time),
        sa.Column("sent_at", Seconds),
        sa.Column("stream", sa.String(255)),
        sa.Column("stream_sequence", BigInt),
        sa.Column("confirmed_at", Seconds),
        sa.Index(
            "ix_natspubsub_outbox_pending",
            "status", "partition", "id",
            postgresql_where=pending, sqlite_where=pending,
        ),
        sa.Index(
            "ix_natspubsub_outbox_key",
            "status", "ordering_key", "id",
            postgresql_where=pending, sqlite_where=pending,
        ),
        sa.Index(
            "ix_natspubsub_outbox_sent",
            "status", "sent_at",
            postgresql_where=sent, sqlite_where=sent,
        ),
    )  # fmt: skip


class OutboxWriter:
    """Adds rows to the caller's transaction.

    :param partitions: over how many partitions the rows are spread.
    :param committed: called after a transaction with rows in it has been committed; it must
        not wait or raise. Only a hint: the relay finds the rows by itself.
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
        self._committed = committed
        self._hooked: WeakSet[type] = WeakSet()

    def add(self, prepared: Sequence[Prepared]) -> list[bool]:
        """Add rows to the session; they are inserted by its next flush and follow savepoints.

        A message whose event id the caller chose is left out if the outbox has it already.

        :returns: for each message, whether it was there.
        :raises TablesMissing: the tables are not in the database.
        """
        session = self._database.session
        self._watch(session)
        known = [item.named and self._has(session, item.event_id) for item in prepared]
        session.add_all(
            self._tables.row(**self._values(item))
            for item, there in zip(prepared, known, strict=True)
            if not there
        )
        return known

    def insert(self, session: orm.Session, prepared: Sequence[Prepared]) -> None:
        """Insert rows at once, for those who are inside a flush already."""
        self._watch(session)
        table = self._tables.outbox
        connection = session.connection(bind_arguments={"clause": table})
        connection.execute(sa.insert(table), [self._values(item) for item in prepared])

    def _has(self, session: orm.Session, event_id: str) -> bool:
        """Whether the session or the table has this event id already."""
        new = (row for row in session.new if isinstance(row, self._tables.row))
        if any(row.event_id == event_id for row in new):  # type: ignore[attr-defined]  # mapped
            return True
        table = self._tables.outbox
        with session.no_autoflush:
            query = sa.select(table.c.id).where(table.c.event_id == event_id)
            return session.execute(query).first() is not None

    def _values(self, item: Prepared) -> dict[str, Any]:
        spread_by = item.ordering_key or item.event_id
        due: Any = item.available_at
        if item.delay is not None:
            due = self._database.now() + item.delay
        return {
            "event_id": item.event_id,
            "subject": item.outgoing.subject,
            "headers": json.dumps(dict(item.outgoing.headers), ensure_ascii=False),
            "payload": item.outgoing.payload,
            "ordering_key": item.ordering_key,
            "partition": zlib.crc32(spread_by.encode()) % self._partitions,
            "available_at": due,
        }

    def _watch(self, session: orm.Session) -> None:
        self._database.require_table(session, self._tables.outbox)
        session.info[_WROTE] = True
        kind = type(session)
        if kind not in self._hooked:
            self._hooked.add(kind)
            event.listen(kind, "after_transaction_end", self._on_end)

    def _on_end(self, session: orm.Session, transaction: orm.SessionTransaction) -> None:
        """Hint when the root ends. ``after_commit`` would fire for savepoints as well."""
        if transaction.parent is None and session.info.pop(_WROTE, False):
            self._committed()
