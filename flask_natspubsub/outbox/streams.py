"""A record of each stream to which the outbox was sent, to detect that it was rewound.

An acknowledgement is a promise to keep a message. A stream that was rewound (by a power loss or
a restored disk) does not report this, so it is compared with the record.
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
    """A stream at the time of the last check.

    :param created: when the stream was created, as the server reports it; empty if it was gone.
    :param last_sequence: its highest sequence.
    :param rewinds: how often it was found to be rewound.
    :param rewound_at: when it was found to be rewound, seconds since the epoch; None if it is
        repaired.
    :param sound_until: when it was last found complete, seconds since the epoch; messages sent
        later may be lost.
    :param reason: how the rewind was detected.
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
    """Reads and writes the records, each in its own short transaction."""

    def __init__(self, database: Database, table: sa.Table) -> None:
        self.table = table
        self._database = database

    def load(self) -> dict[str, StreamRecord]:
        """Return all records by stream name."""
        names = StreamRecord.__dataclass_fields__
        query = sa.select(*(self.table.c[name] for name in names))
        with self._database.begin() as connection:
            rows = connection.execute(query).mappings().all()
        return {row["name"]: StreamRecord(**row) for row in rows}

    def rewound(self) -> list[StreamRecord]:
        """Return the rewound streams whose lost messages were not sent again yet."""
        return [record for record in self.load().values() if record.rewound_at is not None]

    def confirm(self, info: StreamInfo, elapsed: float) -> None:
        """Record that a stream is complete.

        :param info: the state of the stream.
        :param elapsed: seconds since ``info`` was requested.
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
        """Record that a stream was rewound.

        :param info: its present state; None if it is gone.
        :param known: its known number of rewinds. If the record has another number, another
            process has already recorded this rewind, and nothing is written.
        :returns: whether the record was written.
        """
        columns = self.table.c
        created, last = (info.created, info.last_sequence) if info else ("", 0)
        now = database_now()
        update = sa.update(self.table).where(columns.name == name, columns.rewinds == known)
        # The order matters: MySQL uses the new values of columns that were set before.
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
        """Record that lost messages were sent again; False if it was rewound again since."""
        columns = self.table.c
        update = sa.update(self.table).where(
            columns.name == record.name, columns.rewinds == record.rewinds
        )
        with self._database.begin() as connection:
            values = {"rewound_at": None, "sound_until": None, "reason": ""}
            return connection.execute(update.values(values)).rowcount == 1
