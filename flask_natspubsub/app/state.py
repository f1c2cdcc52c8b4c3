"""The state of one application, and where its parts are put together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from flask import Flask

from ..brokers import make_broker
from ..brokers.base import Broker, StreamConfig
from ..brokers.topology import wanted_streams
from ..config.settings import Settings
from ..errors import ConfigurationError, PublishError
from ..middleware import Middleware
from ..observability.health import Check
from ..observability.tracing import current_lineage
from ..publishing.publisher import Publisher
from ..signals import outbox_relayed, send
from ..subscribing.registry import Registry
from ..subscribing.subscription import Subscription, choose
from ..text import get_logger

if TYPE_CHECKING:
    from ..deadletters.reader import DeadLetters
    from ..outbox.relay import Relay
    from ..outbox.verification import SentEvents
    from ..outbox.writer import OutboxWriter
    from ..worker.processor import Processor
    from ..worker.worker import Worker
    from .database import Persistence

EXTENSION = "natspubsub"

_log = get_logger("flask_natspubsub")


class AppState:
    """What belongs to one application; kept in ``app.extensions["natspubsub"]``.

    Nothing here connects before it is asked to: the broker is made at its first use.

    :param registry: the subscribers declared on the extension object.
    :param publishing: the extension's publish middleware.
    """

    #: Set on the instance at the first use, see ``broker``.
    _broker: Broker | None = None

    def __init__(
        self,
        app: Flask,
        settings: Settings,
        registry: Registry,
        publishing: Sequence[Middleware],
        db: Any = None,
        metadata: Any = None,
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.checks: list[Check] = [Check("nats", self._nats_health)]
        self._app = weakref.ref(app)  # the app holds this state: no cycle to collect
        self._subscriptions: list[Subscription] = []
        self._declared: tuple[object, ...] = ()
        self._persistence: Persistence | None = None
        self._warned = False
        #: The publish middleware, now and as it grows.
        self.publish_middleware = publishing
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

    # --- the broker

    def broker(self, *, auto_setup: bool = True) -> Broker:
        """Return the broker, made at the first call.

        :param auto_setup: False makes one that creates no streams, whatever the settings say; a
            broker that was made before is returned as it is.
        """
        if self._broker is not None:
            return self._broker
        made = make_broker(self.settings)
        if auto_setup and self.settings.auto_setup:
            made.want(wanted_streams(self.settings))
        # Threads that come first at once may each make one, which does no I/O; setdefault is
        # atomic, so all of them use the same. A lock could be inherited held by a forked child.
        broker: Broker = vars(self).setdefault("_broker", made)
        return broker

    def use_broker(self, broker: Broker) -> Broker | None:
        """Replace the broker (for tests); returns the one before, if there was one."""
        old = self.forget_broker()
        self._broker = broker
        return old

    def forget_broker(self) -> Broker | None:
        """Let the next use make a new broker; returns the old one, which the caller closes."""
        old: Broker | None = vars(self).pop("_broker", None)
        return old

    @property
    def has_broker(self) -> bool:
        """Whether the broker was made already."""
        return self._broker is not None

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

    # --- subscribers

    def subscriptions(self) -> list[Subscription]:
        """Import ``NATSPUBSUB_SUBSCRIBERS`` and resolve all subscribers for this app.

        They are resolved again, with new instances of the classes, only when others were declared.
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

        self._persistence = Persistence(
            self.app, db, metadata, self.settings, self.broker, self._relayed
        )
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

    def outbox(self) -> OutboxWriter:
        """Return the writer of the outbox; see ``attach_database`` for the errors."""
        return self.require_persistence().writer

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

    # --- what is put together here

    def make_processors(
        self,
        subscriptions: Sequence[Subscription],
        run_async: Callable[[Any, float], Any],
        app_context: Callable[[], AbstractContextManager[object]] | None = None,
    ) -> list[Processor]:
        """Make what processes the messages of each subscription.

        :param run_async: runs an awaitable for at most that many seconds; returns its result.
        :param app_context: makes the context of one message; default: the app's own.
        """
        from ..deadletters.box import DeadLetterBox
        from ..worker.processor import Processor

        box = DeadLetterBox(self.broker(), self.settings)
        persistence = self.persistence_for(subscriptions)
        inbox = persistence.inbox if persistence else None
        context = app_context or self.app.app_context
        return [
            Processor(subscription, box, context, self.emit, run_async, inbox)
            for subscription in subscriptions
        ]

    def make_worker(
        self,
        only: Sequence[str] | None = None,
        *,
        relay: bool = True,
        concurrency: int | None = None,
    ) -> Worker:
        """Make a worker that is not started; see ``NatsPubsub.run_worker``.

        :raises RegistrationError: there is no subscriber of a name in ``only``.
        """
        from ..worker.async_handlers import AsyncHandlers
        from ..worker.duty import Duty, LoopDuty
        from ..worker.worker import RELAY, Worker

        subscriptions = choose(self.subscriptions(), only)
        if self.settings.auto_setup:
            self.broker().want(self.streams())
        handlers = AsyncHandlers()
        processors = self.make_processors(subscriptions, handlers.run)
        duties: list[Duty] = []
        if relay and self.persistence is not None:
            duties.append(LoopDuty(RELAY, self.make_relay()))
        return Worker(
            self.broker(),
            self.settings,
            processors,
            self.emit,
            handlers,
            concurrency=concurrency,
            duties=duties,
            declared=self.subscriptions(),
        )

    def make_relay_worker(self) -> Worker:
        """Make a worker without subscribers, which relays the outbox; it is not started."""
        from ..worker.async_handlers import AsyncHandlers
        from ..worker.duty import LoopDuty
        from ..worker.worker import RELAY, Worker

        duties = [LoopDuty(RELAY, self.make_relay())]
        # Its signals tell of a worker that pulls messages; this one sends none.
        return Worker(self.broker(), self.settings, [], _silent, AsyncHandlers(), duties=duties)

    def make_relay(self) -> Relay:
        """Make a relay for the app's outbox; it is not started."""
        return self.require_persistence().make_relay()

    @property
    def dead_letters(self) -> DeadLetters:
        """The app's dead letters; see ``NatsPubsub.dead_letters``."""
        from ..deadletters.reader import DeadLetters

        return DeadLetters(self.broker(), self.settings, self.subscriptions)

    @property
    def sent_events(self) -> SentEvents:
        """What the outbox has sent; see ``NatsPubsub.sent_events``."""
        return self.require_persistence().sent_events

    # --- events

    def emit(self, signal: Any, **arguments: Any) -> None:
        """Send one of the extension's signals for this application."""
        if signal.receivers:
            send(signal, self.app, **arguments)

    def _relayed(self, count: int) -> None:
        self.emit(outbox_relayed, count=count)

    def close(self, timeout: float = 5.0) -> None:
        """Send what is buffered and close the broker; the next use makes a new one.

        :param timeout: seconds.
        """
        broker = self.forget_broker()
        if broker is not None:
            broker.close(timeout)


def _silent(signal: Any, **arguments: Any) -> None:
    """Send no signal."""
