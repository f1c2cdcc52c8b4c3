"""A subscriber resolved for one app: what the worker and the processor need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from ..brokers.base import ConsumerConfig, DeliverPolicy
from ..config.settings import Settings
from ..errors import RegistrationError
from ..messages import identity, subjects
from ..messages.received import read
from ..middleware import Middleware, is_async
from . import handlers
from .handlers import AnyHandler, Handler
from .options import SubscriberOptions
from .reading import Read, reader
from .subscriber import Declaration

T = TypeVar("T")

#: Limit of messages of one subscriber that wait for their retry or are being handled. The server
#: keeps about 300 bytes of each in memory: without a limit, one broken subscriber could fill it.
UNSETTLED_LIMIT = 1_000_000


class Subscription(msgspec.Struct, frozen=True, kw_only=True):
    """A subscriber of one app, with every option resolved; durations are seconds.

    :param name: as declared; used in logs and dead letters.
    :param app: the name of the app.
    :param durable: the name of its consumer.
    :param topics: as declared; none if it subscribes to a raw subject.
    :param filter_subjects: the subjects that its consumer receives; no two overlap.
    :param handler: called with the decoded message and its context.
    :param message_type: the type in the annotation of the handler's first parameter; None if it
        has none, or ``Any``.
    :param decode: turns the envelope's message into the type the handler asks for.
    :param is_async: whether calling the handler in its middleware returns an awaitable.
    :param middleware: the global, the group's and its own; the first is outermost.
    :param stream: the stream it receives from, if not the application's.
    :param elsewhere: the name of its consumer if another stream turns out to have its subjects;
        empty if no other stream is looked for.
    :param read: decodes a delivery.
    """

    name: str
    app: str
    durable: str
    topics: tuple[str, ...]
    filter_subjects: tuple[str, ...]
    handler: Handler
    decode: Callable[[Any], Any]
    is_async: bool
    max_deliver: int
    ack_wait: float
    backoff: tuple[float, ...]
    concurrency: int
    timeout: float
    inbox: bool
    ordered: bool
    deliver_policy: DeliverPolicy
    dead_letter: bool
    middleware: tuple[Middleware, ...]
    message_type: Any = None
    stream: str | None = None
    elsewhere: str = ""
    read: Read = read

    @property
    def key(self) -> str:
        """Its unique name among the subscribers of all apps; see ``messages.identity``."""
        return identity.subscriber_key(self.app, self.name)

    @property
    def token(self) -> str:
        """The name as one token of a subject, for dead letters."""
        return subjects.slug(self.name)

    @property
    def max_ack_pending(self) -> int:
        """Limit of unsettled messages at which the server delivers no new ones.

        Messages that wait for their retry count too, so it does not limit how many a worker
        holds: each worker requests no more than it can handle.
        """
        return 1 if self.ordered else UNSETTLED_LIMIT

    def consumer_config(self, stream: str) -> ConsumerConfig:
        """Return the consumer that it needs.

        :param stream: the application's stream.
        """
        return ConsumerConfig(
            stream=self.stream or stream,
            elsewhere=self.elsewhere,
            durable=self.durable,
            filter_subjects=self.filter_subjects,
            app=self.app,
            subscriber=self.name,
            ack_wait=self.ack_wait,
            deliver_policy=self.deliver_policy,
            max_ack_pending=self.max_ack_pending,
        )


def resolve(
    declaration: Declaration, settings: Settings, around: Sequence[Middleware] = ()
) -> Subscription:
    """Resolve a declaration for the app that has ``settings``.

    :param around: the middleware outside the subscriber's own.
    :raises RegistrationError: the handler's message type cannot be found or decoded into,
        or the class cannot be instantiated.
    """
    options, who = declaration.options, declaration.who
    handler = _handler(declaration)
    annotation = handlers.message_annotation(who, handler)
    middleware = (*around, *options.middleware)
    is_foreign = _is_foreign(declaration, settings)
    durable = declaration.durable(settings.app_name)
    # A stream of another team serves all environments, and each needs a consumer of its own.
    elsewhere = f"{settings.env}-{durable}"
    return Subscription(
        name=declaration.name,
        app=settings.app_name,
        durable=elsewhere if _has_other_stream(options, settings) else durable,
        topics=declaration.topics,
        filter_subjects=_filter_subjects(declaration, settings),
        handler=handlers.with_context(who, handler),
        message_type=None if annotation is Any else annotation,
        decode=handlers.message_decoder(
            who, annotation, plain=is_foreign or not _enveloped(options)
        ),
        is_async=is_async(handler) or any(map(is_async, middleware)),
        max_deliver=_or(options.max_deliver, settings.max_deliver),
        ack_wait=_or(options.ack_wait, settings.ack_wait),
        backoff=_or(options.backoff, settings.backoff),
        concurrency=1 if options.ordered else _or(options.concurrency, settings.concurrency),
        timeout=_or(options.timeout, settings.handler_timeout),
        inbox=_or(options.inbox, settings.use_inbox),
        ordered=_or(options.ordered, False),
        deliver_policy=_or(options.deliver_policy, "all"),
        dead_letter=_or(options.dead_letter, settings.use_dlq),
        middleware=middleware,
        stream=options.stream,
        elsewhere=elsewhere if is_foreign and options.stream is None else "",
        read=reader(options.envelope, is_foreign=is_foreign, annotation=annotation),
    )


def _has_other_stream(options: SubscriberOptions, settings: Settings) -> bool:
    return options.stream is not None and options.stream != settings.stream


def _enveloped(options: SubscriberOptions) -> bool:
    return options.envelope in (None, True)


def _is_foreign(declaration: Declaration, settings: Settings) -> bool:
    """Whether it subscribes to a raw subject outside those of the environment."""
    subject = declaration.options.subject
    return subject is not None and not subjects.overlaps(subject, f"{settings.env}.>")


def _handler(declaration: Declaration) -> AnyHandler:
    source = declaration.source
    if not isinstance(source, type):
        return source
    try:
        handler: AnyHandler = source().handle
        return handler
    except TypeError as error:
        raise RegistrationError(
            f"{declaration.who} cannot be instantiated ({error}).",
            "Its __init__ is called without arguments, once for each app.",
        ) from error


def _filter_subjects(declaration: Declaration, settings: Settings) -> tuple[str, ...]:
    if declaration.options.subject is not None:
        return declaration.filters
    producer = declaration.options.producer or settings.app_name
    return tuple(
        subjects.filter_for(settings.env, producer, topic) for topic in declaration.filters
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def choose(subscriptions: Sequence[Subscription], only: Sequence[str] | None) -> list[Subscription]:
    """Return the subscriptions named in ``only``; all if it is None or empty.

    :raises RegistrationError: a name that no subscriber has.
    """
    if not only:
        return list(subscriptions)
    names = {subscription.name for subscription in subscriptions}
    for name in only:
        if name not in names:
            raise RegistrationError(
                f"There is no subscriber {name!r}.", f"Known: {', '.join(sorted(names)) or 'none'}."
            )
    return [subscription for subscription in subscriptions if subscription.name in only]
