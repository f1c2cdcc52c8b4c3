"""The subscribers, groups and middleware declared to one extension object."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from ..config.settings import Settings
from ..errors import ConfigurationError, RegistrationError
from ..middleware import Middleware
from .handlers import AnyHandler
from .options import SubscriberOptions
from .subscriber import (
    Declaration,
    Subscriber,
    check_replaces,
    declare_class,
    declare_handler,
    unbound_classes,
)
from .subscription import Subscription, resolve

F = TypeVar("F", bound=Callable[..., Any])

#: Modules that some app lists in NATSPUBSUB_SUBSCRIBERS: classes in them are for the apps that
#: list them, not for every app of the process.
_listed: set[str] = set()


class _Declarations:
    """Base of Registry and SubscriberGroup: handlers are declared to them."""

    def __init__(self) -> None:
        self._declared: dict[tuple[str, str, str], Declaration] = {}
        #: The number of apps initialised so far, now and when each subscriber was declared; None
        #: in a group, which does not count.
        self._apps: int | None = None
        self._apps_then: dict[tuple[str, str, str], int | None] = {}
        self._middleware: list[Middleware] = []

    def subscriber(self, *topics: str | Sequence[str], **options: Any) -> Callable[[F], F]:
        """Declare the decorated function a subscriber; it can still be called as before.

        :param topics: topics or lists of topics; ``*`` and ``>`` stand for tokens.
        :param options: see ``SubscriberOptions``.
        :raises RegistrationError: the subscriber cannot work as declared.
        :raises InvalidTopic: a topic that NATS cannot address.
        """
        if topics and callable(topics[0]):
            raise RegistrationError(
                "The decorator 'subscriber' was used without topics.",
                "Write @pubsub.subscriber('order.created'), with parentheses.",
            )

        def decorate(function: F) -> F:
            self.add(function, *topics, **options)
            return function

        return decorate

    def add(self, handler: AnyHandler, *topics: str | Sequence[str], **options: Any) -> None:
        """Declare ``handler`` a subscriber, as the decorator ``subscriber`` does."""
        self._keep(self._declare(handler, topics, options))

    def _declare(
        self, handler: AnyHandler, topics: Sequence[Any], options: Mapping[str, Any]
    ) -> Declaration:
        return declare_handler(handler, topics, options)

    def _keep(self, declaration: Declaration) -> None:
        older = self._declared.get(declaration.identity)
        if older is not None:
            same_app = self._apps is not None and self._apps_then[older.identity] == self._apps
            name = f"the name {declaration.name!r}"
            check_replaces(declaration, older, name, same_app=same_app)
            del self._declared[declaration.identity]
        self._declared[declaration.identity] = declaration
        self._apps_then[declaration.identity] = self._apps

    def _add_middleware(self, function: Middleware) -> None:
        if not callable(function):
            raise RegistrationError(
                f"The middleware {function!r} is not a function.",
                "A middleware takes (context, call_next).",
            )
        if function not in self._middleware:
            self._middleware.append(function)


class SubscriberGroup(_Declarations):
    """Subscribers that share a prefix, middleware and options; as a blueprint is for views.

    ::

        orders = SubscriberGroup("orders", prefix="order", max_deliver=10)

        @orders.subscriber("created")            # the topic order.created
        def notify(message, context): ...        # the subscriber "orders-notify"

    :param name: put before the names of its subscribers.
    :param prefix: put before their topics, joined with a dot.
    :param producer: the app whose events they receive, ``"*"`` for any.
    :param middleware: functions around their handlers, inside the extension's.
    :param options: defaults for their options; see ``SubscriberOptions``.
    :raises RegistrationError: an unknown option or a bad value.
    """

    def __init__(
        self,
        name: str,
        prefix: str = "",
        producer: str | None = None,
        middleware: Middleware | Iterable[Middleware] = (),
        **options: Any,
    ) -> None:
        super().__init__()
        who = f"Group {name!r}"
        if "subject" in options:
            raise RegistrationError(
                f"{who}: unknown option 'subject'.", "Only subscribers have one."
            )
        parsed = SubscriberOptions.parse(
            who, {"name": name, "producer": producer, "middleware": middleware, **options}
        )
        self.name = name
        self.prefix = prefix
        self._defaults = msgspec.structs.replace(parsed, name=None, middleware=())
        self._middleware.extend(parsed.middleware)

    def middleware(self, function: F) -> F:
        """Put the decorated function around the handlers of this group."""
        self._add_middleware(function)
        return function

    def declarations(self) -> Iterator[tuple[Declaration, tuple[Middleware, ...]]]:
        """Yield each subscriber with the group's middleware."""
        for declaration in self._declared.values():
            yield declaration, tuple(self._middleware)

    def _declare(
        self, handler: AnyHandler, topics: Sequence[Any], options: Mapping[str, Any]
    ) -> Declaration:
        return declare_handler(
            handler, topics, options, group=self.name, prefix=self.prefix, defaults=self._defaults
        )


class Registry(_Declarations):
    """The subscribers, groups and middleware of one extension object.

    Nothing in it belongs to an app: ``resolve`` returns an app's subscriptions.
    """

    def __init__(self) -> None:
        super().__init__()
        self._apps = 0
        self._groups: list[SubscriberGroup] = []

    def begin_app(self) -> None:
        """Note that another app is initialised: its factory may declare everything again."""
        self._apps = (self._apps or 0) + 1

    def add_class(self, cls: type[Subscriber]) -> None:
        """Bind a Subscriber class, as ``class Audit(Subscriber, pubsub=pubsub)`` does."""
        if not issubclass(cls, Subscriber):
            raise RegistrationError(
                f"{cls!r} is no subscriber class.", "Derive it from Subscriber."
            )
        self._keep(declare_class(cls))

    def add_group(self, group: SubscriberGroup) -> None:
        """Add a group; subscribers declared to it later count as well."""
        if not isinstance(group, SubscriberGroup):
            raise RegistrationError(f"{group!r} is no group.", "Pass a SubscriberGroup.")
        if group not in self._groups:
            self._groups.append(group)

    def add_middleware(self, function: Middleware) -> None:
        """Put ``function`` around all handlers, inside what was added before.

        The same function object is added once only.
        """
        self._add_middleware(function)

    def resolve(self, settings: Settings) -> list[Subscription]:
        """Return the subscriptions of the app that has ``settings``, in order of declaration.

        Each call returns new ones, with new instances of Subscriber classes: call it once
        for an app and keep the result.

        :raises RegistrationError: two subscribers with one durable name; a handler whose
            message type cannot be found.
        """
        chosen: dict[str, tuple[Declaration, tuple[Middleware, ...]]] = {}
        declared = self._all(settings.subscribers)
        for declaration, around in sorted(declared, key=lambda pair: pair[0].order):
            durable = declaration.durable(settings.app_name)
            if durable in chosen:
                older, _ = chosen.pop(durable)
                check_replaces(declaration, older, f"the durable name {durable!r}")
            chosen[durable] = declaration, around
        return [
            resolve(declaration, settings, (*self._middleware, *around))
            for declaration, around in chosen.values()
        ]

    def fingerprint(self, names: Sequence[str]) -> tuple[object, ...]:
        """Return a value that changes with the declarations.

        :param names: the app's NATSPUBSUB_SUBSCRIBERS.
        """
        declared = [(one.order, id(one.source), around) for one, around in self._all(names)]
        return (*declared, *self._middleware)

    def import_all(self, names: Iterable[str]) -> None:
        """Import the modules in NATSPUBSUB_SUBSCRIBERS; of a package, all modules in it.

        :raises ConfigurationError: an import failed; its cause is the ImportError.
        """
        for name in names:
            _listed.add(name)
            try:
                _import_tree(name)
            except ImportError as error:
                raise ConfigurationError(
                    f"NATSPUBSUB_SUBSCRIBERS: {name!r} cannot be imported ({error}).",
                    "Check its spelling, and that what it imports is installed.",
                ) from error

    def _all(self, names: Sequence[str]) -> Iterator[tuple[Declaration, tuple[Middleware, ...]]]:
        for declaration in self._declared.values():
            yield declaration, ()
        for declaration in unbound_classes():
            module = declaration.source.__module__
            if _is_in(module, names) or not _is_in(module, _listed):
                yield declaration, ()
        for group in self._groups:
            yield from group.declarations()


def _is_in(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def _import_tree(name: str) -> None:
    module = importlib.import_module(name)
    for found in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{name}."):
        if not found.name.endswith(".__main__"):
            _import_tree(found.name)
