"""Subscribers as they are declared: the class ``Subscriber``, and ``Declaration``."""

from __future__ import annotations

import gc
import inspect
import itertools
import types
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import msgspec

from ..brokers.base import DeliverPolicy
from ..errors import InvalidTopic, RegistrationError
from ..messages import subjects
from . import handlers
from .handlers import AnyHandler
from .options import OPTION_NAMES, SubscriberOptions, nearest_option

__all__ = [
    "Declaration",
    "Subscriber",
    "SubscriberOptions",
    "declare_class",
    "declare_handler",
    "unbound_classes",
]

T = TypeVar("T")

_order = itertools.count()


class Subscriber:
    """Base of subscribers written as classes; an instance is made for each app, without arguments.

    ::

        class Audit(Subscriber):
            topics = ["order.*", "payment.>"]
            max_deliver = 10

            def handle(self, message, context): ...

    A subclass is found once its module is imported, by every extension object of the
    process; ``class Audit(Subscriber, pubsub=pubsub)`` binds it, and its subclasses, to one.
    ``abstract = True`` in a class's own body makes it a base for others only. The class
    attributes are the options of ``SubscriberOptions``; its name defaults to ``audit``.
    """

    abstract: ClassVar[bool] = True

    topics: ClassVar[str | Sequence[str]] = ()
    name: ClassVar[str | None] = None
    producer: ClassVar[str | None] = None
    subject: ClassVar[str | None] = None
    max_deliver: ClassVar[int | None] = None
    ack_wait: ClassVar[Any] = None
    backoff: ClassVar[Any] = None
    concurrency: ClassVar[int | None] = None
    timeout: ClassVar[Any] = None
    inbox: ClassVar[bool | None] = None
    ordered: ClassVar[bool | None] = None
    deliver_policy: ClassVar[DeliverPolicy | None] = None
    dead_letter: ClassVar[bool | None] = None
    stream: ClassVar[str | None] = None
    envelope: ClassVar[Any] = None
    middleware: ClassVar[Any] = ()

    _pubsub: ClassVar[Any] = None

    def __init_subclass__(cls, *, pubsub: Any = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if pubsub is not None:
            cls._pubsub = pubsub
        if cls.__dict__.get("abstract", False):
            return
        _warn_near_misses(cls)
        if cls._pubsub is not None:
            cls._pubsub.registry.add_class(cls)
        else:
            _remember(cls)

    # Any arguments, so that a subclass may take (message) alone and annotate it as it likes.
    def handle(self, *args: Any, **kwargs: Any) -> Any:
        """Handle one message: ``handle(self, message, context)``, plain or async."""
        raise NotImplementedError


#: Subclasses bound to no extension object, with their order and their module's execution.
_unbound: weakref.WeakKeyDictionary[type[Subscriber], tuple[int, Any]] = weakref.WeakKeyDictionary()


def collect_local_classes() -> None:
    """Forget Subscriber classes that were defined in functions which have returned.

    Such a class is a reference cycle: nobody has it any more, and it receives messages until the
    garbage collector comes. Tests define classes like that; applications need not call this.
    """
    if any("<locals>" in cls.__qualname__ for cls in list(_unbound)):
        gc.collect()


def unbound_classes() -> Iterator[Declaration]:
    """Yield the declarations of all live subclasses of Subscriber bound to no extension."""
    for cls, (order, _) in list(_unbound.items()):
        yield declare_class(cls, order=order)


def _remember(cls: type[Subscriber]) -> None:
    declared = declare_class(cls)  # now, so that errors point to the class statement
    for other in list(_unbound):
        if (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__):
            order, execution = _unbound[other]
            older = msgspec.structs.replace(declare_class(other, order), execution=execution)
            check_replaces(declared, older, f"the name {declared.name!r}")
            del _unbound[other]
    _unbound[cls] = declared.order, declared.execution


def _warn_near_misses(cls: type[Subscriber]) -> None:
    known = {"topics", "abstract", *OPTION_NAMES}
    for name, value in vars(cls).items():
        if name.startswith("_") or name in known or callable(value):
            continue
        near = nearest_option(name, cutoff=0.85)
        if near:
            warnings.warn(
                f"{cls.__qualname__}.{name} is no option of a subscriber; did you mean {near}?",
                stacklevel=3,
            )


class Declaration(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A subscriber as written, checked as far as possible without an app's settings.

    :param source: the handler, or the Subscriber class.
    :param topics: as written, a group's prefix included; none if ``options.subject`` is set.
    :param filters: the topics normalised, without those that another one covers.
    :param order: grows with every declaration.
    :param execution: of the module it was declared in; see ``handlers.execution_of``.
    """

    source: AnyHandler | type[Subscriber]
    name: str
    topics: tuple[str, ...]
    filters: tuple[str, ...]
    options: SubscriberOptions
    order: int
    execution: Any = None

    @property
    def identity(self) -> tuple[str, str, str]:
        """Equal for two declarations of the same code, such as before and after a reload."""
        origin: Any = self.source
        if not isinstance(origin, type):
            origin = handlers.function_of(origin)
        return origin.__module__, origin.__qualname__, self.name

    def is_anew(self, older: Declaration) -> bool:
        """Whether its module was executed again since the older one, or both were typed in."""
        code = handlers.code_of(self.source)
        typed_in = getattr(code, "co_filename", "").startswith("<")
        return typed_in or self.execution is not older.execution

    def is_beside(self, older: Declaration) -> bool:
        """Whether both are in one module, and are not one declaration executed twice.

        A reload executes the module again; a factory called twice executes the same code.
        """
        if self.is_anew(older):
            return False
        ours, theirs = handlers.code_of(self.source), handlers.code_of(older.source)
        is_class = isinstance(self.source, type)
        return ours is not theirs or (self.filters != older.filters and not is_class)

    @property
    def who(self) -> str:
        """The subscriber's name and the place of its code, for errors."""
        return _who(self.name, self.source)

    def durable(self, app_name: str) -> str:
        """Return the name of its consumer, which no other subscriber may have."""
        return f"{app_name}-{subjects.slug(self.name)}"


def declare_class(cls: type[Subscriber], order: int | None = None) -> Declaration:
    """Check a Subscriber class; see ``_declare`` for the errors."""
    name = cls.name if isinstance(cls.name, str) else handlers.snake_case(cls.__name__)
    who = _who(name, cls)
    if cls.handle is Subscriber.handle:
        raise RegistrationError(
            f"{who} has no method handle(self, message, context).",
            "Write it, or set abstract = True in the class if it is a base for others.",
        )
    static = isinstance(inspect.getattr_static(cls, "handle"), (staticmethod, classmethod))
    handlers.check_shape(who, cls.handle if static else types.MethodType(cls.handle, cls))
    given = {option: getattr(cls, option) for option in OPTION_NAMES}
    return _declare(cls, name, _flatten(who, [cls.topics or ()]), given, order=order)


def declare_handler(
    handler: AnyHandler,
    topics: Sequence[Any],
    given: Mapping[str, Any],
    *,
    group: str = "",
    prefix: str = "",
    defaults: SubscriberOptions | None = None,
) -> Declaration:
    """Check a handler and its decorator's arguments; see ``_declare`` for the errors.

    :param topics: strings, and lists of strings.
    :param given: the options; ``topics`` may be among them.
    :param group: the group's name, put before the subscriber's.
    :param prefix: put before each topic.
    """
    who = _who(handlers.default_name(handler), handler)
    if isinstance(handler, type) or not callable(handler):
        raise RegistrationError(
            f"{who} is not a function.", "Classes subscribe by deriving from Subscriber."
        )
    handlers.check_shape(who, handler)
    given = dict(given)
    written = _flatten(who, [*topics, given.pop("topics", None) or ()])
    name = given.get("name") or handlers.default_name(handler)
    if name == "<lambda>":
        raise RegistrationError(f"{who} has no name of its own.", "Give it one with name=...")
    return _declare(
        handler,
        f"{group}-{name}" if group else name,
        tuple(f"{prefix}.{topic}" if prefix else topic for topic in written),
        given,
        defaults=defaults,
    )


def _declare(
    source: AnyHandler | type[Subscriber],
    name: str,
    topics: tuple[str, ...],
    given: Mapping[str, Any],
    *,
    defaults: SubscriberOptions | None = None,
    order: int | None = None,
) -> Declaration:
    """Check topics and options.

    :raises RegistrationError: an unknown option or a bad value; not exactly one of topics
        and ``subject``; topics that overlap without one covering the other.
    :raises InvalidTopic: a topic or subject that NATS cannot address.
    """
    who = _who(name, source)
    options = SubscriberOptions.parse(who, given)
    if bool(topics) == (options.subject is not None):
        raise RegistrationError(
            f"{who} has {'both topics and a subject' if topics else 'no topics'}.",
            "Give either topics, such as 'order.created', or subject='a.raw.nats.subject'.",
        )
    return Declaration(
        source=source,
        name=name,
        topics=topics,
        filters=_filters(who, topics, options.subject),
        options=options.with_defaults(defaults) if defaults else options,
        order=next(_order) if order is None else order,
        execution=handlers.execution_of(_module(source)),
    )


def _module(source: AnyHandler | type[Subscriber]) -> str:
    origin = source if isinstance(source, type) else handlers.function_of(source)
    return str(getattr(origin, "__module__", ""))


def check_replaces(
    newer: Declaration, older: Declaration, what: str, *, same_app: bool = False
) -> None:
    """Check that a declaration repeats an older one (a reload, a factory called twice).

    :param what: what both have, for the error.
    :param same_app: whether no app was initialised between the two, so no factory was called twice.
    :raises RegistrationError: it is another one, and would silently replace the older.
    """
    another = same_app and newer.source is not older.source and not newer.is_anew(older)
    if newer.identity == older.identity and not (newer.is_beside(older) or another):
        return
    raise RegistrationError(
        f"{older.who} and {newer.who} both have {what}.",
        "List all topics of one handler in one declaration, or give each its own name=...",
    )


def _flatten(who: str, topics: Sequence[Any]) -> tuple[str, ...]:
    flat: list[Any] = []
    for item in topics:
        flat.extend(item if isinstance(item, (list, tuple)) else [item])
    for topic in flat:
        if not isinstance(topic, str):
            raise RegistrationError(
                f"{who}: a topic is {topic!r}.", "Allowed: a text such as 'order.created'."
            )
    return tuple(flat)


def _filters(who: str, topics: tuple[str, ...], subject: str | None) -> tuple[str, ...]:
    try:
        if subject is not None:
            return (subjects.check_filter(subject),)
        normalized = [subjects.normalize_topic(topic, wildcards=True) for topic in topics]
    except InvalidTopic as error:
        raise InvalidTopic(f"{who}: {error.message}", error.fix) from error
    return _disjoint(who, normalized)


def _disjoint(who: str, filters: Sequence[str]) -> tuple[str, ...]:
    """Drop filters that others cover: the server refuses a consumer whose filters overlap."""
    kept = tuple(
        one
        for one in dict.fromkeys(filters)
        if not any(subjects.covers(other, one) for other in filters if other != one)
    )
    for one, other in itertools.combinations(kept, 2):
        if subjects.overlaps(one, other):
            raise RegistrationError(
                f"{who}: the topics {one!r} and {other!r} overlap, and the server refuses "
                "that within one consumer.",
                "Make two subscribers of them, or use one topic that covers both.",
            )
    return kept


def _who(name: str, source: AnyHandler | type) -> str:
    return f"Subscriber {name!r} ({handlers.place_of(source)})"
