"""The tables of the outbox, and the words that its rows are told apart by.

A row holds the encoded envelope, so what is sent is what was committed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm

from ..database.dialects import BigInt, Blob, Identifier, LongText, Seconds, database_now
from ..database.leases import make_lease_table
from .names import PENDING
from .streams import stream_table

TABLE = "natspubsub_outbox"
PENDING_INDEX = "ix_natspubsub_outbox_pending"
DELAYED_INDEX = "ix_natspubsub_outbox_delayed"
#: Ids that one query asks for.
ID_CHUNK = 500
_INFO = "natspubsub_outbox"


class OutboxRow:
    """A row that waits in the session for its next flush; mapped to the table of each metadata.

    The session drops it with the savepoint that it was added in. It is not the session that
    inserts it, but ``OutboxWriter.insert_waiting``.

    ``named`` says whether another transaction may insert the same event id.
    """

    event_id: str
    values: dict[str, Any]
    named: bool


@dataclass(frozen=True, slots=True)
class OutboxTables:
    """The tables in one metadata, and the class that maps to the outbox."""

    outbox: sa.Table
    lease: sa.Table
    stream: sa.Table
    row: type[OutboxRow]


def define_tables(metadata: sa.MetaData) -> OutboxTables:
    """Define the tables in the user's metadata, once."""
    tables: OutboxTables | None = metadata.info.get(_INFO)
    if tables is None:
        outbox, lease = _outbox_table(metadata), make_lease_table(metadata)
        row = type("NatsPubsubOutbox", (OutboxRow,), {})
        # No more columns than needed: each costs something for each row.
        orm.registry(metadata=metadata).map_imperatively(
            row,
            outbox,
            primary_key=[outbox.c.event_id],
            include_properties=["event_id"],
        )
        tables = OutboxTables(outbox, lease, stream_table(metadata), row)
        metadata.info[_INFO] = tables
    return tables


def _outbox_table(metadata: sa.MetaData) -> sa.Table:
    pending = sa.text("status = 'pending'")
    # Two indexes: rows that are due some day do not stand in the way of those that are due now.
    at_once = sa.text("status = 'pending' AND available_at IS NULL")
    delayed = sa.text("status = 'pending' AND available_at IS NOT NULL")
    sent, parked = sa.text("status = 'sent'"), sa.text("status = 'parked'")
    return sa.Table(
        TABLE,
        metadata,
        sa.Column("id", BigInt, primary_key=True, autoincrement=True),
        sa.Column("event_id", Identifier, nullable=False, unique=True),
        sa.Column("subject", sa.String(255), nullable=False),
        sa.Column("headers", LongText, nullable=False),
        sa.Column("payload", Blob, nullable=False),
        sa.Column("ordering_key", Identifier),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("status", sa.String(8), nullable=False, default=PENDING),
        sa.Column("available_at", Seconds),
        sa.Column("attempts", sa.Integer, nullable=False, default=0),
        sa.Column("last_error", sa.String(1024)),
        sa.Column("created_at", Seconds, nullable=False, default=database_now()),
        sa.Column("sent_at", Seconds),
        sa.Column("stream", sa.String(255)),
        sa.Column("stream_sequence", BigInt),
        sa.Column("confirmed_at", Seconds),
        sa.Index(
            PENDING_INDEX,
            "status", "partition", "id",
            postgresql_where=at_once, sqlite_where=at_once,
        ),
        sa.Index(
            DELAYED_INDEX,
            "status", "partition", "available_at", "id",
            postgresql_where=delayed, sqlite_where=delayed,
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
        sa.Index(
            "ix_natspubsub_outbox_parked",
            "status", "id",
            postgresql_where=parked, sqlite_where=parked,
        ),
    )  # fmt: skip


def is_pending(table: sa.FromClause) -> sa.ColumnElement[bool]:
    """Whether a row is still to be sent."""
    return has_status(table, PENDING)


def has_status(table: sa.FromClause, status: str) -> sa.ColumnElement[bool]:
    """Whether a row has a status, which is written into the text of the query.

    A bound value would not show the database that a partial index fits.

    :param status: ``PENDING``, ``SENT`` or ``PARKED``; no text of a user's.
    """
    return table.c.status == sa.literal_column(f"'{status}'", sa.String)


def is_pending_by_index(table: sa.FromClause) -> sa.ColumnElement[bool]:
    """``is_pending``, for which the index of delayed rows, and that of the others, both fit."""
    at = table.c.available_at
    return sa.or_(
        sa.and_(is_pending(table), at.is_(None)), sa.and_(is_pending(table), at.is_not(None))
    )
