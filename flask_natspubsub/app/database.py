"""The outbox and the inbox of one application, put together over its database."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from flask import Flask, request_finished
from sqlalchemy.schema import CreateIndex, CreateTable

from ..brokers.base import Broker
from ..brokers.topology import wakeup_subject
from ..config.settings import Settings
from ..database.adapter import Database
from ..errors import ConfigurationError
from ..inbox.inbox import Inbox, define_table
from ..inspection import outbox_health
from ..observability.health import Check
from ..outbox.housekeeping import Housekeeping
from ..outbox.names import DIALECTS
from ..outbox.relay import Relay
from ..outbox.store import OutboxStore
from ..outbox.tables import define_tables
from ..outbox.verification import SentEvents
from ..outbox.writer import OutboxWriter


class Persistence:
    """Everything of an application that needs its database.

    :param broker: returns the application's broker.
    :param relayed: called with the number of rows that a relay of this process has sent.
    """

    def __init__(
        self,
        app: Flask,
        db: Any,
        metadata: sa.MetaData | None,
        settings: Settings,
        broker: Callable[[], Broker],
        relayed: Callable[[int], None],
    ) -> None:
        self.database = Database(app, db, metadata, settings.bind_key)
        self.tables = define_tables(self.database.metadata)
        self.inbox = Inbox(self.database, define_table(self.database.metadata), self.tables.lease)
        self.store = OutboxStore(self.database, self.tables)
        self.writer = OutboxWriter(
            self.database, self.tables, settings.outbox_partitions, self._wake_relays
        )
        self._settings = settings
        self._wakeup_subject = wakeup_subject(settings)
        self._broker = broker
        self._relayed = relayed
        self._relays: weakref.WeakSet[Relay] = weakref.WeakSet()
        request_finished.connect(self._on_response, app)

    def _on_response(self, sender: Flask, response: Any, **_: Any) -> None:
        """Warn of no forgotten commit after an error response: there was none to be expected."""
        if response.status_code >= 400:
            self.database.forgive()

    def make_relay(self) -> Relay:
        """Make a relay for the outbox; it is not started."""
        broker, settings = self._broker(), self._settings
        housekeeping = Housekeeping(self.store, self.inbox, broker, settings)
        relay = Relay(self.store, broker, settings, self._relayed, housekeeping)
        self._relays.add(relay)
        return relay

    def _wake_relays(self) -> None:
        """Tell the relays, here and in other processes, that rows were committed.

        Where the wake-up is lost, polling finds the rows.
        """
        for relay in list(self._relays):
            relay.wake()
        self._broker().send(self._wakeup_subject, b"")

    @property
    def sent_events(self) -> SentEvents:
        """What the outbox has sent, to be verified and sent again."""
        return SentEvents(self.store, self._broker())

    def ddl(self, dialect: str | None = None) -> str:
        """Return the SQL that creates the tables.

        :param dialect: one of ``DIALECTS``; default: the database's own.
        :raises ConfigurationError: another one.
        """
        name = dialect or self.database.dialect
        if name not in DIALECTS:
            raise ConfigurationError(f"Unknown dialect {name!r}.", f"Known: {', '.join(DIALECTS)}.")
        target = sa.engine.url.URL.create(name).get_dialect()()
        statements: list[CreateTable | CreateIndex] = []
        tables = self.tables
        for table in (tables.outbox, tables.lease, tables.stream, self.inbox.table):
            statements.append(CreateTable(table))
            statements += [CreateIndex(index) for index in sorted(table.indexes, key=_name)]
        return "\n\n".join(f"{str(one.compile(dialect=target)).strip()};" for one in statements)

    def require_tables(self) -> None:
        """Check that the tables exist.

        :raises TablesMissing: one of them does not.
        :raises DatabaseError: the database failed.
        """
        with self.database.begin() as connection:
            for table in (self.tables.outbox, self.tables.lease, self.inbox.table):
                connection.execute(sa.select(sa.literal(1)).select_from(table).limit(1))

    def health_checks(self) -> list[Check]:
        """Return the checks of the database and the outbox."""
        return [
            Check("database", self._ping),
            Check("outbox", self._outbox_health, required=False),
        ]

    def _ping(self) -> None:
        with self.database.begin() as connection:
            connection.execute(sa.select(1))

    def _outbox_health(self) -> dict[str, Any]:
        health = outbox_health(self.store)
        return {
            "ok": health.is_ok,
            "oldest_pending_seconds": health.oldest_pending_seconds,
            "rewound_streams": [stream.name for stream in health.rewound],
        }


def _name(index: sa.Index) -> str:
    return str(index.name)
