"""The extension object that applications create and call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from flask import Blueprint, Flask, current_app, has_app_context

from .app.state import EXTENSION, AppState
from .config.settings import Settings
from .errors import ConfigurationError
from .middleware import Middleware
from .observability import tracing
from .observability.health import Check, make_blueprint
from .publishing.batch import Batch
from .publishing.draft import Draft, PublishReceipt, drafts_for
from .publishing.forwarding import Build, forward
from .subscribing.registry import Registry, SubscriberGroup

if TYPE_CHECKING:
    from concurrent.futures import Future

    from blinker import Signal

    from .deadletters.reader import DeadLetters
    from .outbox.relay import Relay
    from .outbox.verification import SentEvents
    from .publishing.changes import ChangeFeed, ModelChange
    from .worker.worker import Worker

F = TypeVar("F", bound=Callable[..., Any])


class NatsPubsub:
    """Publishing and subscribing for Flask applications.

    One object may serve several applications; its methods act for ``current_app``, or,
    without an application context, for the only application it was initialised with.

    :param app: initialise this application at once.
    :param db: the Flask-SQLAlchemy object, for the outbox and the inbox; default: whatever is
        in ``app.extensions["sqlalchemy"]``.
    :param metadata: where the outbox and inbox tables are defined; default ``db.metadata``.
        Flask-SQLAlchemy-Lite has none: pass that of your models.
    """

    def __init__(self, app: Flask | None = None, db: Any = None, metadata: Any = None) -> None:
        self.registry = Registry()
        #: Functions around every publish; see ``publish_middleware``.
        self.publishing: list[Middleware] = []
        self._checks: list[Check] = []
        self._changes: ChangeFeed | None = None
        self._apps: list[weakref.ref[Flask]] = []
        if app is not None:
            self.init_app(app, db, metadata)

    def init_app(self, app: Flask, db: Any = None, metadata: Any = None) -> None:
        """Read the settings and add the hooks. No I/O is done and no thread started.

        :raises ConfigurationError: a bad ``NATSPUBSUB_*`` value, a second call for ``app``, or
            an outbox or inbox without a database.
        """
        if EXTENSION in app.extensions:
            raise ConfigurationError(
                "A NatsPubsub extension is registered on this Flask app already.",
                "Import and use that one instead of calling init_app again.",
            )
        settings = Settings.from_config(app.config, app.name)
        self.registry.begin_app()
        app.extensions[EXTENSION] = AppState(
            app, settings, self.registry, self.publishing, db, metadata
        )
        self._apps.append(weakref.ref(app, self._apps.remove))
        tracing.install(app, settings.trace_header)
        if settings.health_url_prefix is not None:
            app.register_blueprint(self.health_blueprint, url_prefix=settings.health_url_prefix)
        app.shell_context_processor(lambda: {"pubsub": self})

    def shutdown(self, app: Flask | None = None, timeout: float = 5.0) -> None:
        """Send what is buffered, then close the app's threads and sockets.

        Without ``app``, for all applications. Publishing afterwards connects anew.
        """
        for one in [app] if app is not None else [ref() for ref in self._apps]:
            if one is not None:
                self.state(one).close(timeout)

    def state(self, app: Flask | None = None) -> AppState:
        """Return the state of ``app``, of ``current_app``, or of the only application.

        :raises RuntimeError: no application can be meant, or it was not initialised.
        """
        if app is None:
            app = current_app._get_current_object() if has_app_context() else self._only_app()  # type: ignore[attr-defined]  # a proxy
        state = app.extensions.get(EXTENSION)
        if not isinstance(state, AppState) or state.registry is not self.registry:
            raise RuntimeError(
                f"The Flask app {app.name!r} is not registered with this NatsPubsub object. "
                "Did you forget to call init_app?"
            )
        return state

    def _only_app(self) -> Flask:
        app = self._apps[0]() if len(self._apps) == 1 else None
        if app is not None:
            return app
        found = f"{len(self._apps)} Flask apps" if self._apps else "no Flask app"
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
        """Publish a message and wait until JetStream has stored it, or write it to the outbox.

        Callable from any thread. A list of topics publishes one message for each and returns
        a list of receipts.

        :param topic: such as ``"order.created"``.
        :param message: a dict, dataclass, msgspec Struct or pydantic model.
        :param timeout: seconds to wait; default ``NATSPUBSUB_PUBLISH_TIMEOUT``.
        :param event_id: the message's id, by which the stream and the inbox know a second
            copy; default a new UUID. Other options: ``trace_id``, ``correlation_id``,
            ``causation_id`` (inherited from the request or the handled message),
            ``occurred_at`` (an aware datetime), ``headers``, ``message_type``; ``outbox``
            (default ``NATSPUBSUB_USE_OUTBOX``) and, with it, ``ordering_key``, ``delay`` in
            seconds and ``available_at``.
        :raises PublishError: one of its subclasses, see ``flask_natspubsub.errors``.
        :raises InvalidTopic: the topic cannot be addressed.
        """
        publisher = self.state().publisher
        if options:
            _check_options(options)
        if isinstance(topic, (list, tuple)):
            return publisher.publish_all(drafts_for(topic, message, **options), timeout)
        return publisher.publish(Draft(topic, message, **options), timeout)

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
            if rest:
                _check_options(rest[0])
                drafts += drafts_for(topic, message, **rest[0])
            elif isinstance(topic, str):
                drafts.append(Draft(topic, message))
            else:
                drafts += drafts_for(topic, message)
        return publisher.publish_all(drafts, timeout)

    def batch(self, *, timeout: float | None = None) -> Batch:
        """Collect messages in a ``with`` block; they are sent together when it ends well."""
        return Batch(self.state().publisher, timeout)

    def publish_nowait(
        self, topic: str, message: Any, *, timeout: float | None = None, **options: Any
    ) -> Future[PublishReceipt]:
        """Publish without waiting; the future gives the receipt or the error."""
        _check_options(options)
        return self.state().publisher.publish_nowait(Draft(topic, message, **options), timeout)

    async def publish_async(
        self, topic: str, message: Any, *, timeout: float | None = None, **options: Any
    ) -> PublishReceipt:
        """Publish from an async view: waits without blocking the view's event loop."""
        from .publishing.coroutines import answer_to  # brings asyncio, which the caller has

        _check_options(options)
        draft, publisher = Draft(topic, message, **options), self.state().publisher
        return await answer_to(lambda done: publisher.start(draft, timeout, done))

    def publish_middleware(self, function: F) -> F:
        """Register ``function(draft, call_next)`` around every publish; a decorator.

        It may change the draft, and returns what ``call_next()`` returns: a ``Publication``, whose
        ``on_done`` says when the message is stored or has failed.
        """
        self.publishing.append(function)
        return function

    # --- signals and model changes

    def forward_signal(
        self,
        signal: Signal,
        topic: str,
        message: Build | None = None,
        *,
        outbox: bool = True,
        **options: Any,
    ) -> None:
        """Publish a message whenever ``signal`` is sent, in the sender's transaction.

        :param message: makes the message of ``(sender, **arguments)``; None publishes nothing.
            Default: the signal's arguments are the message.
        :param outbox: False publishes directly, outside the transaction.
        :param options: as for ``publish``.
        """
        _check_options(options)
        options = options | {"outbox": outbox}
        forward(signal, message, lambda made: self.publish(topic, made, **options))

    def forward(self, signal: Signal, topic: str, **options: Any) -> Callable[[F], F]:
        """Publish what the decorated function makes of a signal; see ``forward_signal``."""

        def decorate(function: F) -> F:
            self.forward_signal(signal, topic, function, **options)
            return function

        return decorate

    def publish_changes(self, model: type, topic: str, fields: Iterable[str] | None = None) -> None:
        """Publish what happens to the rows of a model, in the flush that writes them.

        Publishes ``{topic}.created``, ``.updated`` (with ``changed``, the names of the changed
        columns) and ``.deleted``. Core and bulk statements fire no model events and are not
        seen.

        :param fields: the columns in the message; default: all but those that look like
            secrets, such as password hashes and tokens, and those that are binary.
        :raises ConfigurationError: not a model, or a field that is no column of it or binary.
        :raises InvalidTopic: the topic cannot be addressed.
        """
        if self._changes is None:
            from .publishing.changes import ChangeFeed  # SQLAlchemy is an optional dependency

            self._changes = ChangeFeed(self._publish_changes)
        self._changes.watch(model, topic, fields)

    def _publish_changes(self, session: Any, changes: Sequence[ModelChange]) -> None:
        drafts = [Draft(change.topic, change.message, outbox=True) for change in changes]
        self.state().publisher.insert(session, drafts)

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
        """Make a worker without starting it; see ``run_worker``."""
        return self.state().make_worker(only, relay=relay, concurrency=concurrency)

    def make_relay(self) -> Relay:
        """Make a relay of the outbox without starting it."""
        return self.state().make_relay()

    @property
    def dead_letters(self) -> DeadLetters:
        """The app's dead letters: iterate, ``list``, ``get``, ``replay``, ``discard``."""
        return self.state().dead_letters

    @property
    def sent_events(self) -> SentEvents:
        """What the outbox has sent: ``verify`` that the streams have it, ``resend`` it."""
        return self.state().sent_events

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


def _check_options(options: Mapping[str, Any]) -> None:
    """Check the options of a publish; a typo is a TypeError, as for any function."""
    for name in options:
        if name not in _DRAFT_OPTIONS:
            raise TypeError(f"publish() got an unexpected keyword argument {name!r}")


_DRAFT_OPTIONS = frozenset(Draft.__struct_fields__) - {"topic", "message"}
