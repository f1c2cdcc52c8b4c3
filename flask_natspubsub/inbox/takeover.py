"""Inbox rows of version 0.1, which had no app in their keys, still count after an upgrade.

Two apps on one database took each other's rows for their own then. Now a row names the app. For as
long as rows are kept after the upgrade, each event also gets a row with the old key: workers of
both versions may run side by side, and each must see what the other has handled. This module can
go, with ``Handling.old_event`` and ``old_subscriber``, once nobody upgrades from 0.1 any more.
"""

from __future__ import annotations

import threading

import sqlalchemy as sa

from ..database.dialects import database_now, insert_new
from ..messages.identity import Handling
from .claims import Claims

#: How long the old keys are used; seconds. At least as long as rows were kept by default.
DURATION = 8 * 24 * 3600.0
#: Says, among the leases, until when.
_NAME = "inbox/old-names"
#: Rows looked at, of the oldest and of the newest, to see whether there are old ones.
_LOOK = 200
#: Seconds by which the clocks of the database and of the server may differ.
_CLOCKS = 5.0


class Takeover:
    """Knows whether old rows count, and inserts and reads them."""

    def __init__(self, table: sa.Table, leases: sa.Table, claims: Claims) -> None:
        self._table = table
        self._claims = claims
        self._leases = leases
        #: Whether old rows count; None while nobody has looked.
        self.is_on: bool | None = None
        self._lock = threading.Lock()

    def claim(self, connection: sa.Connection, handling: Handling) -> bool:
        """Insert the row with the old key; False if version 0.1 has handled the event.

        Waits for a worker of that version that is handling it now.
        """
        if not self._is_needed(connection):
            return True
        if self._claims.insert(connection, _old_key(handling)):
            return True
        return not self._counts(connection, handling)

    def unclaim(self, connection: sa.Connection, handling: Handling) -> None:
        """Delete the row with the old key."""
        if self.is_on:
            connection.execute(sa.delete(self._table).where(self._is(_old_key(handling))))

    def _counts(self, connection: sa.Connection, handling: Handling) -> bool:
        """Whether the old row that is there is one of the old version, and of this event."""
        columns = self._table.c
        if handling.stored_at:
            at = sa.select(columns.processed_at).where(self._is(_old_key(handling)))
            processed = connection.execute(at).scalar() or 0.0
            return float(processed) >= handling.stored_at - _CLOCKS
        # Another app of the new version has written it, beside its own, if that one is there.
        query = sa.select(columns.subscriber).where(columns.event_id == handling.event)
        # Locked, as MariaDB would else show the rows of before the wait.
        rows = connection.execute(query.with_for_update(read=True)).scalars()
        others = "/" + handling.subscriber.rpartition("/")[2]
        return not any(name.endswith(others) and name != handling.subscriber for name in rows)

    def _is(self, key: dict[str, str]) -> sa.ColumnElement[bool]:
        columns = self._table.c
        return sa.and_(*(columns[name] == value for name, value in key.items()))

    def _is_needed(self, connection: sa.Connection) -> bool:
        if self.is_on is None:
            with self._lock:
                if self.is_on is None:
                    self.is_on = self._look(connection)
        return self.is_on

    def _look(self, connection: sa.Connection) -> bool:
        """Ask until when old rows count; if nobody knows yet, whether there are any."""
        columns = self._leases.c
        still = sa.select(columns.expires_at > database_now()).where(columns.name == _NAME)
        known = connection.execute(still).scalar()
        if known is not None:
            return bool(known)
        if not self._has_old_rows(connection):
            return False
        until = database_now() + DURATION
        values = {"name": _NAME, "owner": "", "token": 1, "expires_at": until}
        insert_new(connection, self._leases, values)
        return True

    def _has_old_rows(self, connection: sa.Connection) -> bool:
        columns = self._table.c
        at = columns.processed_at
        return any(
            "/" not in name
            for order in (at.asc(), at.desc())
            for name in connection.execute(
                sa.select(columns.subscriber).order_by(order).limit(_LOOK)
            ).scalars()
        )


def _old_key(handling: Handling) -> dict[str, str]:
    return {"event_id": handling.old_event, "subscriber": handling.old_subscriber}
