"""What is remembered of each stream the outbox was sent to, so that its loss is noticed.

An acknowledgement is a promise to keep a message. A stream that has gone back to an earlier
state (a loss of power, a restored disk) says nothing of it; only who remembers can tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from ..brokers.base import StreamInfo
from ..database.adapter import Database
from ..database.dialects import BigInt, Identifier, Seconds, database_now, insert_new

TABLE = "natspubsub_stream"


@dataclass(frozen=True, slots=True)
class StreamRecord:
    """A stream as it was when it was last looked at.

    :param created: as the server says; empty: the stream was gone.
    :param last_sequence: its highest sequence then.
    :param rewinds: how often it was found to have lost messages.
    :param rewound_at: when it was found so, seconds since the epoch; None if all is repaired.
    :param sound_until: when it was last seen to be whole; of what was sent later, nothing is sure.
    :param reason: what gave it away.
    """

    name: str
    created: str
    last_sequence: int
    rewinds: int
    rewound_at: float | None
    sound_until: float | None
    reason: str


def stream_table(metadata: sa.MetaData) -> sa.Table:
    """Define ``natspubsub_stream`` in the user's metadata."""
    return sa.Table(
        TABLE,
        metadata,
        sa.Column("name", Identifier, primary_key=True),
        sa.Column("created", sa.String(64), nullable=False),
        sa.Column("last_sequence", BigInt, nullable=False),
        sa.Column("checked_at", Seconds, nullable=False),
        sa.Column("rewinds", sa.Integer, nullable=False, default=0),
        sa.Column("rewound_at", Seconds),
        sa.Column("sound_until", Seconds),
        sa.Column("reason", sa.String(255), nullable=False, default=""),
    )


class StreamRecords:
    """Reads and writes the records, in short transactions of their own."""

    def __init__(self, database: Database, table: sa.Table) -> None:
        self.table = table
        self._database = database

    def load(self) -> dict[str, StreamRecord]:
        """Return all records by the names of the streams."""
        names = StreamRecord.__dataclass_fields__
        query = sa.select(*(self.table.c[name] for name in names))
        with self._database.begin() as connection:
            rows = connection.execute(query).mappings().all()
        return {row["name"]: StreamRecord(**row) for row in rows}

    def rewound(self) -> list[StreamRecord]:
        """Return the streams that have lost messages which were not sent again yet."""
        return [record for record in self.load().values() if record.rewound_at is not None]

    def confirm(self, info: StreamInfo, elapsed: float) -> None:
        """Note that a stream was whole.

        :param elapsed: seconds since it was asked.
        """
        name, now = info.config.name, database_now() - elapsed
        values = {
            "created": info.created, "last_sequence": info.last_sequence, "checked_at": now,
        }  # fmt: skip
        update = sa.update(self.table).where(self.table.c.name == name).values(values)
        with self._database.begin() as connection:
            if not connection.execute(update).rowcount:
                insert_new(connection, self.table, {"name": name, "rewinds": 0, **values})

    def report(self, name: str, reason: str, info: StreamInfo | None, known: int) -> bool:
        """Note that a stream has lost messages.

        :param info: as it is now; None if it is gone.
        :param known: its number of rewinds so far; another one means that somebody else has
            noted this one already, and nothing is written.
        :returns: whether it was written.
        """
        columns = self.table.c
        created, last = (info.created, info.last_sequence) if info else ("", 0)
        now = database_now()
        update = sa.update(self.table).where(columns.name == name, columns.rewinds == known)
        # In this order: MySQL takes the new values of those before.
        ordered = update.ordered_values(
            (columns.sound_until, sa.func.coalesce(columns.sound_until, columns.checked_at)),
            (columns.checked_at, now),
            (columns.rewound_at, now),
            (columns.rewinds, known + 1),
            (columns.reason, reason[:255]),
            (columns.created, created),
            (columns.last_sequence, last),
        )
        first = {
            "name": name, "created": created, "last_sequence": last, "checked_at": now,
            "rewinds": 1, "rewound_at": now, "sound_until": 0.0, "reason": reason[:255],
        }  # fmt: skip
        with self._database.begin() as connection:
            if connection.execute(ordered).rowcount:
                return True
            return known == 0 and insert_new(connection, self.table, first)

    def clear(self, record: StreamRecord) -> bool:
        """Note that all was sent again; False if it has been rewound once more since."""
        columns = self.table.c
        update = sa.update(self.table).where(
            columns.name == record.name, columns.rewinds == record.rewinds
        )
        with self._database.begin() as connection:
            values = {"rewound_at": None, "sound_until": None, "reason": ""}
            return connection.execute(update.values(values)).rowcount == 1
