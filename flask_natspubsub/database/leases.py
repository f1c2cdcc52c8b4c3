"""Leases: rights that one process at a time has, until they expire by the database's clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from .adapter import Database, Statement
from .dialects import BigInt, Seconds, database_now, insert_new

#: By less than this many seconds a clock may be put back without a lease being taken for it.
CLOCK_STEP = 1.0


def make_lease_table(metadata: sa.MetaData) -> sa.Table:
    """Define ``natspubsub_lease`` in the user's metadata."""
    return sa.Table(
        "natspubsub_lease",
        metadata,
        sa.Column("name", sa.String(191), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("token", BigInt, nullable=False),
        sa.Column("expires_at", Seconds, nullable=False),
    )


@dataclass(frozen=True, slots=True)
class Lease:
    """A right that one process has until it expires; ``token`` grows with each owner."""

    name: str
    owner: str
    token: int


class Leases:
    """Rights in ``natspubsub_lease``; at any time at most one owner holds a name.

    One with more time left than any lease is given was taken by a clock that was wrong then and
    has been put back since: it counts as expired.
    """

    def __init__(self, database: Database, table: sa.Table, seconds: float) -> None:
        self.table = table
        self.seconds = seconds
        self._database = database
        ours = [table.c[name] == sa.bindparam(f"its_{name}") for name in ("name", "owner", "token")]
        self._renew = Statement(sa.update(table).where(*ours).values(expires_at=self._until()))

    def acquire(self, name: str, owner: str) -> Lease | None:
        """Take a free or expired lease; None while somebody else has it.

        Looks before it writes, and in transactions of their own: those who wait for a lease
        look often, and a look is all that SQLite can take beside a writer.
        """
        columns = self.table.c
        look = sa.select(columns.token, self._is_free())
        with self._database.begin() as connection:
            row = connection.execute(look.where(columns.name == name)).first()
        if row is None:
            return self._create(Lease(name, owner, 1))
        token, expired = row
        return self._take(Lease(name, owner, int(token) + 1)) if expired else None

    def _create(self, lease: Lease) -> Lease | None:
        values = {"name": lease.name, "owner": lease.owner, "token": lease.token}
        with self._database.begin() as connection:
            created = insert_new(connection, self.table, values | {"expires_at": self._until()})
        return lease if created else None

    def _take(self, lease: Lease) -> Lease | None:
        columns = self.table.c
        statement = (
            sa.update(self.table)
            .where(columns.name == lease.name, columns.token == lease.token - 1)
            .where(self._is_free())
            .values(owner=lease.owner, token=lease.token, expires_at=self._until())
        )
        with self._database.begin() as connection:
            return lease if connection.execute(statement).rowcount == 1 else None

    def renew(self, lease: Lease) -> bool:
        """Extend a lease; False if it is lost."""
        with self._database.begin() as connection:
            return self.renew_in(connection, lease)

    def renew_in(self, connection: sa.Connection, lease: Lease) -> bool:
        """Extend a lease within a transaction, which it thereby fences: False if it is lost."""
        renewed = self._renew.execute(
            connection, its_name=lease.name, its_owner=lease.owner, its_token=lease.token
        )
        return renewed.rowcount == 1

    def release(self, lease: Lease) -> None:
        """Give a lease back, so that another may take it at once."""
        with self._database.begin() as connection:
            connection.execute(sa.update(self.table).where(self._is(lease)).values(expires_at=0.0))

    def holders(self) -> list[dict[str, Any]]:
        """Return name, owner and remaining seconds of every lease."""
        table = self.table
        left = (table.c.expires_at - database_now()).label("seconds_left")
        with self._database.begin() as connection:
            query = sa.select(table.c.name, table.c.owner, left)
            rows = connection.execute(query.where(table.c.owner != ""))
            return [dict(row) for row in rows.mappings()]

    def held(self) -> list[str]:
        """Return the names of the leases that somebody has now."""
        columns = self.table.c
        held = sa.select(columns.name).where(columns.expires_at >= database_now())
        with self._database.begin() as connection:
            return list(connection.execute(held).scalars())

    def _is(self, lease: Lease) -> sa.ColumnElement[bool]:
        columns = self.table.c
        return sa.and_(
            columns.name == lease.name, columns.owner == lease.owner, columns.token == lease.token
        )

    def _is_free(self) -> sa.ColumnElement[bool]:
        until = self.table.c.expires_at
        return sa.or_(until < database_now(), until > self._until() + CLOCK_STEP)

    def _until(self) -> sa.ColumnElement[float]:
        return database_now() + self.seconds
