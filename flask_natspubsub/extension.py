"""The extension object: what a Flask project holds in its hand."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar, overload

from flask import Blueprint, Flask, current_app, has_app_context

from .brokers import make_broker
from .brokers.base import Broker, StreamConfig
from .brokers.topology import wanted_streams
from .errors import ConfigurationError, PublishError
from .observability import tracing
from .observability.health import Check, make_blueprint
from .publishing.batch import Batch
from .publishing.publisher import Draft, Publisher, PublishReceipt
from .settings import Settings
from .signals import message_published, send
from .subscribing.middleware import Middleware, compose
from .subscribing.registry import Registry, SubscriberGroup
from .subscribing.subscription import Subscription

if TYPE_CHECKING:
    from .subscribing.deadletters import DeadLetters
    from .worker.runner import Worker

F = TypeVar("F", bound=Callable[..., Any])

EXTENSION = "natspubsub"


class AppState:
    """What belongs to one application; kept in ``app.extensions["natspubsub"]``.

    Nothing here connects before it is asked to: the broker is made at its first use.
    """

    def __init__(self, extension: NatsPubsub, app: Flask, settings: Settings, db: Any) -> None:
        self.extension = extension
        self.settings = settings
        self.db = db
        self.checks: list[Check] = [Check("nats", lambda: self.is_connected)]
        self._app = weakref.ref(app)  # the app holds this state: no cycle to collect
        self._broker: Broker | None = None
        self._lock = threading.Lock()
        self._subscriptions: list[Subscription] = []
        self._declared: tuple[object, ...] = ()
        self.publisher = Publisher(settings, self.broker, extension._around, self._published)

    @property
    def app(self) -> Flask:
        """The application."""
        app = self._app()
        if app is None:
            raise RuntimeError("the Flask application of this state is gone")
        return app

    def broker(self) -> Broker:
        """Return the broker, made at the first call."""
        if self._broker is None:
            with self._lock:
                if self._broker is None:
                    self._broker = make_broker(self.settings)
                    if self.settings.auto_setup:
                        self._broker.want(wanted_streams(self.settings))
        return self._broker

    def use_broker(self, broker: Broker) -> Broker | None:
        """Replace the broker (for tests) and return the one there was."""
        with self._lock:
            old, self._broker = self._broker, broker
        return old

    def forget_broker(self) -> None:
        """Let the next use make a new broker; the old one is the caller's to close."""
        with self._lock:
            self._broker = None

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

    def subscriptions(self) -> list[Subscription]:
        """Import ``NATSPUBSUB_SUBSCRIBERS`` and settle all subscribers for this app.

        Settled anew, with new instances of the classes, only when others were declared.
        """
        registry = self.extension.registry
        registry.import_all(self.settings.subscribers)
        declared = registry.fingerprint()
        if declared != self._declared:
            self._subscriptions, self._declared = registry.resolve(self.settings), declared
        return self._subscriptions

    def streams(self) -> list[StreamConfig]:
        """Return the streams that the app needs for what it publishes and subscribes to."""
        filters = [name for one in self.subscriptions() for name in one.filter_subjects]
        return wanted_streams(self.settings, filters)

    def emit(self, signal: Any, **arguments: Any) -> None:
        """Send one of the extension's signals for this application."""
        send(signal, self.app, **arguments)

    def _published(self, receipt: PublishReceipt) -> None:
        if message_published.receivers:
            self.emit(message_published, receipt=receipt)

    def close(self, timeout: float) -> None:
        """Close the broker; the next use makes a new one."""
        with self._lock:
            broker, self._broker = self._broker, None
        if broker is not None:
            broker.close(timeout)


class NatsPubsub:
    """Publishing and subscribing for Flask applications.

    One object may serve several applications; its methods act for ``current_app``, or,
    without an application context, for the only application it was initialised with.

    :param app: initialise this application at once.
    :param db: the Flask-SQLAlchemy object, for the outbox and the inbox; default: whatever is
        in ``app.extensions["sqlalchemy"]``.
    """

    def __init__(self, app: Flask | None = None, db: Any = None) -> None:
        self.registry = Registry()
        self._publish_middleware: list[Middleware] = []
        self._checks: list[Check] = []
        self._apps: weakref.WeakSet[Flask] = weakref.WeakSet()
        if app is not None:
            self.init_app(app, db=db)

    def init_app(self, app: Flask, db: Any = None) -> None:
        """Read the settings and add the hooks. No I/O is done and no thread started.

        :raises ConfigurationError: a bad ``NATSPUBSUB_*`` value, or a second call for ``app``.
        """
        if EXTENSION in app.extensions:
            raise ConfigurationError(
                "A NatsPubsub extension is registered on this Flask app already.",
                "Import and use that one instead of calling init_app again.",
            )
        settings = Settings.from_config(app.config, app.name)
        app.extensions[EXTENSION] = AppState(self, app, settings, db)
        self._apps.add(app)
        tracing.install(app, settings.trace_header)
        if settings.health_url_prefix is not None:
            app.register_blueprint(self.health_blueprint, url_prefix=settings.health_url_prefix)
        app.shell_context_processor(lambda: {"pubsub": self})

    def shutdown(self, app: Flask | None = None, timeout: float = 5.0) -> None:
        """Send what is buffered, then close the app's threads and sockets.

        Without ``app``, for all applications. Publishing afterwards connects anew.
        """
        for one in [app] if app is not None else list(self._apps):
            self.state(one).close(timeout)

    def state(self, app: Flask | None = None) -> AppState:
        """Return the state of ``app``, of ``current_app``, or of the only application.

        :raises RuntimeError: no application can be meant, or it was not initialised.
        """
        if app is None:
            app = current_app._get_current_object() if has_app_context() else self._only_app()  # type: ignore[attr-defined]  # a proxy
        state = app.extensions.get(EXTENSION)
        if not isinstance(state, AppState) or state.extension is not self:
            raise RuntimeError(
                f"The Flask app {app.name!r} is not registered with this NatsPubsub object. "
                "Did you forget to call init_app?"
            )
        return state

    def _only_app(self) -> Flask:
        apps = list(self._apps)
        if len(apps) == 1:
            return apps[0]
        found = "no Flask app" if not apps else f"{len(apps)} Flask apps"
        raise RuntimeError(
            f"There is no application context, and this NatsPubsub object has {found}. "
            "Use it inside 'with app.app_context():'."
        )

    # --- publishing

    @overload
    def publish(self, topic: str, message: Any, **options: Any) -> PublishReceipt: ...

    @overload
    def publish(
        self, topic: list[str] | tuple[str, ...], message: Any, **options: Any
    ) -> list[PublishReceipt]: ...

    def publish(
        self,
        topic: str | list[str] | tuple[str, ...],
        message: Any,
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> PublishReceipt | list[PublishReceipt]:
        """Publish a message and wait until JetStream has stored it.

        Callable from any thread. A list of topics publishes one message for each and returns
        a list of receipts.

        :param topic: such as ``"order.created"``.
        :param message: a dict, dataclass, msgspec Struct or pydantic model.
        :param timeout: seconds to wait; default ``NATSPUBSUB_PUBLISH_TIMEOUT``.
        :param event_id: the message's id, by which the stream and the inbox know a second
            copy; default a new UUID. Other options: ``trace_id``, ``correlation_id``,
            ``causation_id`` (inherited from the request or the handled message),
            ``occurred_at`` (an aware datetime), ``headers``, ``message_type``.
        :raises PublishError: one of its subclasses, see ``flask_natspubsub.errors``.
        :raises InvalidTopic: the topic cannot be addressed.
        """
        publisher = self.state().publisher
        drafts = publisher.drafts(topic, message, **_draft_options(options))
        if isinstance(topic, str):
            return publisher.publish(drafts[0], timeout)
        return publisher.publish_all(drafts, timeout)

    def publish_event(
        self, domain: str, resource: str, action: str, message: Any, **options: Any
    ) -> PublishReceipt:
        """Publish in the event form: topic ``domain.resource.action``, and those keys apart."""
        topic = f"{domain}.{resource}.{action}"
        return self.publish(topic, message, event=(domain, resource, action), **options)

    def publish_many(
        self, items: Iterable[Sequence[Any]], *, timeout: float | None = None
    ) -> list[PublishReceipt]:
        """Publish many messages with one wait for all.

        :param items: ``(topic, message)`` or ``(topic, message, options)`` each.
        :raises PartlyPublished: some were not stored; it has the result of each.
        :raises PublishError: none was stored.
        """
        publisher = self.state().publisher
        drafts: list[Draft] = []
        for topic, message, *rest in items:
            drafts += publisher.drafts(topic, message, **_draft_options(*rest))
        return publisher.publish_all(drafts, timeout)

    def batch(self, *, timeout: float | None = None) -> Batch:
        """Collect messages in a ``with`` block; they are sent together when it ends well."""
        return Batch(self.state().publisher, timeout)

    def publish_nowait(
        self, topic: str, message: Any, *, timeout: float | None = None, **options: Any
    ) -> Future[PublishReceipt]:
        """Publish without waiting; the future gives the receipt or the error."""
        publisher = self.state().publisher
        (draft,) = publisher.drafts(topic, message, **_draft_options(options))
        return publisher.publish_nowait(draft, timeout)

    async def publish_async(
        self, topic: str, message: Any, *, timeout: float | None = None, **options: Any
    ) -> PublishReceipt:
        """Publish from an async view: waits without blocking the view's event loop."""
        import asyncio  # costs as much as Flask itself; whoever awaits has it already

        return await asyncio.wrap_future(
            self.publish_nowait(topic, message, timeout=timeout, **options)
        )

    def publish_middleware(self, function: F) -> F:
        """Register ``function(draft, call_next)`` around every publish; a decorator.

        It may change the draft, and returns what ``call_next()`` returns: the receipt in
        ``publish``; where several are sent together, the prepared message.
        """
        self._publish_middleware.append(function)
        return function

    def _around(self, innermost: Callable[[Draft], Any]) -> Callable[[Draft], Any]:
        return compose(self._publish_middleware, innermost)

    # --- subscribing

    def subscriber(self, *topics: Any, **options: Any) -> Callable[[F], F]:
        """Make the decorated function a subscriber; see ``SubscriberOptions`` for options."""
        return self.registry.subscriber(*topics, **options)

    def register_group(self, group: SubscriberGroup) -> None:
        """Add the subscribers of a group, as a blueprint adds routes."""
        self.registry.add_group(group)

    def middleware(self, function: F) -> F:
        """Register ``function(context, call_next)`` around every handler; a decorator."""
        self.registry.add_middleware(function)
        return function

    def run_worker(
        self,
        only: Sequence[str] | None = None,
        *,
        relay: bool = True,
        concurrency: int | None = None,
    ) -> Worker:
        """Start a worker in threads of this process; use it in ``with`` or ``stop`` it.

        :param only: names of subscribers; default all.
        :param relay: also relay the outbox.
        :param concurrency: handler threads; default ``NATSPUBSUB_CONCURRENCY``.
        :raises TopologyError: a stream is missing, or a subscriber would get nothing.
        """
        return self.make_worker(only, relay=relay, concurrency=concurrency).start()

    def make_worker(
        self,
        only: Sequence[str] | None = None,
        *,
        relay: bool = True,
        concurrency: int | None = None,
    ) -> Worker:
        """Make a worker without starting it."""
        from .worker.runner import Worker, choose  # brings asyncio: see brokers.make_broker

        state = self.state()
        subscriptions = choose(state.subscriptions(), only)
        if state.settings.auto_setup:
            state.broker().want(state.streams())
        return Worker(
            state.broker(),
            state.settings,
            subscriptions,
            state.app.app_context,
            state.emit,
            concurrency,
        )

    @property
    def dead_letters(self) -> DeadLetters:
        """The dead letters of the app's environment: iterate, ``get``, ``replay``, ``discard``."""
        from .subscribing.deadletters import DeadLetters

        state = self.state()
        return DeadLetters(state.broker(), state.settings)

    # --- health

    @property
    def is_connected(self) -> bool:
        """Whether there is a live connection to NATS now."""
        return self.state().is_connected

    def health_check(self, name: str, *, required: bool = True) -> Callable[[F], F]:
        """Add a check to the health endpoints; a decorator.

        The function returns True, None or a dict if all is well; False, ``{"ok": False}`` or an
        exception if not. Its dict is shown on ``/detailed``, so keep secrets out of it.
        """

        def decorate(function: F) -> F:
            self._checks.append(Check(name, function, required))
            return function

        return decorate

    @property
    def health_blueprint(self) -> Blueprint:
        """A blueprint with ``/``, ``/live``, ``/ready`` and ``/detailed``, to register yourself."""
        return make_blueprint(lambda: [*self.state().checks, *self._checks])


def _draft_options(options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Check the options of a publish; a typo is a TypeError, as for any function."""
    options = dict(options or {})
    for name in options:
        if name not in _DRAFT_OPTIONS:
            raise TypeError(f"publish() got an unexpected keyword argument {name!r}")
    return options


_DRAFT_OPTIONS = frozenset(Draft.__dataclass_fields__) - {"topic", "message"}
