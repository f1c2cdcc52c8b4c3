"""What belongs to one application: its settings, broker, publisher, database."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flask import Flask

from ..brokers import make_broker
from ..brokers.base import Broker, StreamConfig
from ..brokers.topology import wakeup_subject, wanted_streams
from ..config.settings import Settings
from ..errors import ConfigurationError, PublishError
from ..middleware import Middleware
from ..observability.health import Check
from ..observability.tracing import current_lineage
from ..publishing.publisher import Publisher
from ..signals import outbox_relayed, send
from ..subscribing.registry import Registry
from ..subscribing.subscription import Subscription
from ..text import get_logger

if TYPE_CHECKING:
    from ..outbox.relay import Relay
    from ..outbox.writer import OutboxWriter
    from .database import Persistence

EXTENSION = "natspubsub"
_BROKER = "broker"

_log = get_logger("flask_natspubsub")


class AppState:
    """What belongs to one application; kept in ``app.extensions["natspubsub"]``.

    Nothing here connects before it is asked to: the broker is made at its first use.
    """

    def __init__(
        self,
        extension: Any,
        app: Flask,
        settings: Settings,
        db: Any = None,
        metadata: Any = None,
    ) -> None:
        self.settings = settings
        #: The ``NatsPubsub`` object that the app was initialised with.
        self.extension = extension
        self.registry: Registry = extension.registry
        self.checks: list[Check] = [Check("nats", self._nats_health)]
        self._app = weakref.ref(app)  # the app holds this state: no cycle to collect
        self._kept: dict[str, Broker] = {}
        self._subscriptions: list[Subscription] = []
        self._declared: tuple[object, ...] = ()
        self._persistence: Persistence | None = None
        self._warned = False
        self._relays: weakref.WeakSet[Relay] = weakref.WeakSet()
        #: The publish middleware, now and as it grows.
        self.publish_middleware: Sequence[Middleware] = extension.publishing
        #: Returns the ids that a message published here inherits.
        self.lineage = current_lineage
        #: The writer of the outbox, once something has asked for it.
        self.writer: OutboxWriter | None = None
        self.publisher = Publisher(self)
        if db is not None or settings.use_outbox or settings.use_inbox:
            self.attach_database(db, metadata)

    @property
    def app(self) -> Flask:
        """The application."""
        app = self._app()
        if app is None:
            raise RuntimeError("the Flask application of this state is gone")
        return app

    def broker(self) -> Broker:
        """Return the broker, made at the first call."""
        broker = self._kept.get(_BROKER)
        if broker is None:
            made = make_broker(self.settings)
            if self.settings.auto_setup:
                made.want(wanted_streams(self.settings))
            # No lock, which a forked child could inherit held: making one does no I/O, and of
            # two made at the same moment one is forgotten.
            broker = self._kept.setdefault(_BROKER, made)
        return broker

    def use_broker(self, broker: Broker) -> Broker | None:
        """Replace the broker (for tests) and return the one there was."""
        old = self._kept.pop(_BROKER, None)
        self._kept[_BROKER] = broker
        return old

    def forget_broker(self) -> None:
        """Let the next use make a new broker; the old one is the caller's to close."""
        self._kept.pop(_BROKER, None)

    @property
    def is_connected(self) -> bool:
        """Whether there is a live connection now; starts to connect if nothing has yet."""
        broker = self.broker()
        if not broker.is_connected:
            try:
                broker.connect(self.settings.connect_timeout)
            except PublishError:
                return False
        return True

    def _nats_health(self) -> dict[str, Any]:
        connected, load = self.is_connected, self.broker().load()
        return {"ok": connected and not load.get("publishes_unanswered"), **load}

    def subscriptions(self) -> list[Subscription]:
        """Import ``NATSPUBSUB_SUBSCRIBERS`` and settle all subscribers for this app.

        Settled anew, with new instances of the classes, only when others were declared.
        """
        registry = self.registry
        registry.import_all(self.settings.subscribers)
        declared = registry.fingerprint(self.settings.subscribers)
        if declared != self._declared:
            self._subscriptions, self._declared = registry.resolve(self.settings), declared
        return self._subscriptions

    def streams(self) -> list[StreamConfig]:
        """Return the streams that the app needs for what it publishes and subscribes to."""
        filters = [
            name
            for one in self.subscriptions()
            if one.stream in (None, self.settings.stream)
            for name in one.filter_subjects
        ]
        return wanted_streams(self.settings, filters)

    # --- the database

    def attach_database(self, db: Any = None, metadata: Any = None) -> Persistence:
        """Define the outbox and inbox tables in the application's metadata. No I/O.

        :raises ConfigurationError: there is no database.
        """
        db = db if db is not None else self.app.extensions.get("sqlalchemy")
        if db is None:
            raise ConfigurationError(
                "The outbox and the inbox need a database, and the app has none.",
                "Initialise Flask-SQLAlchemy first, or pass it: NatsPubsub(app, db=db).",
            )
        from .database import Persistence  # SQLAlchemy is an optional dependency

        self._persistence = Persistence(self.app, db, metadata, self.settings, self._committed)
        self.writer = self._persistence.writer
        self.checks += self._persistence.health_checks()
        return self._persistence

    @property
    def persistence(self) -> Persistence | None:
        """The outbox and the inbox; None while nothing has asked for them."""
        return self._persistence

    def require_persistence(self) -> Persistence:
        """Return the outbox and the inbox, attached now if need be; see ``attach_database``."""
        return self._persistence or self.attach_database()

    def persistence_for(self, subscriptions: Sequence[Subscription]) -> Persistence | None:
        """Return what these subscribers need of the database; attached if one has an inbox."""
        if any(subscription.inbox for subscription in subscriptions):
            return self.require_persistence()
        return self._persistence

    def make_relay(self) -> Relay:
        """Make a relay for the app's outbox; it is not started."""
        relay = self.require_persistence().make_relay(
            self.broker(), lambda count: self.emit(outbox_relayed, count=count)
        )
        self._relays.add(relay)
        return relay

    def outbox(self) -> OutboxWriter:
        """Return the writer of the outbox; see ``attach_database`` for the errors."""
        return self.require_persistence().writer

    def _committed(self) -> None:
        """Tell the relays, here and elsewhere, that there are rows; the hint may be lost."""
        for relay in list(self._relays):
            relay.nudge()
        self.broker().send(wakeup_subject(self.settings), b"")

    def before_direct(self) -> None:
        """Warn, once, of a publish that bypasses the outbox while the session has changes."""
        pending = self._persistence is not None and self._persistence.database.has_pending_changes
        if pending and not self._warned:
            self._warned = True
            _log.warning(
                "published directly while the session has changes that are not committed: the "
                "event stays even if they are rolled back. The outbox sends it with them: "
                "publish(..., outbox=True), or NATSPUBSUB_USE_OUTBOX"
            )

    # --- events

    def emit(self, signal: Any, **arguments: Any) -> None:
        """Send one of the extension's signals for this application."""
        if signal.receivers:
            send(signal, self.app, **arguments)

    def close(self, timeout: float) -> None:
        """Close the broker; the next use makes a new one."""
        broker = self._kept.pop(_BROKER, None)
        if broker is not None:
            broker.close(timeout)
