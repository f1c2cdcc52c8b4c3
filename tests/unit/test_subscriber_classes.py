"""Subscribers written as classes."""

from __future__ import annotations

import dataclasses
import datetime as dt
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from flask_natspubsub.config.settings import Settings
from flask_natspubsub.errors import RegistrationError
from flask_natspubsub.subscribing.registry import Registry
from flask_natspubsub.subscribing.subscriber import Subscriber
from flask_natspubsub.subscribing.subscription import Subscription

if TYPE_CHECKING:
    from flask_natspubsub.subscribing.context import MessageContext

SETTINGS = Settings(env="test", app_name="shop")
CONTEXT: Any = SimpleNamespace(event_id="e1")


@dataclasses.dataclass
class Order:
    order_id: int


def one(registry: Registry, settings: Settings = SETTINGS) -> Subscription:
    (subscription,) = registry.resolve(settings)
    return subscription


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def pubsub(registry: Registry) -> Any:
    """Stand in for an extension object."""
    return SimpleNamespace(registry=registry)


def test_a_class_is_a_subscriber(pubsub: Any, registry: Registry) -> None:
    class HTTPAuditLog(Subscriber, pubsub=pubsub):
        topics = ("order.*", "payment.>")
        producer = "*"
        max_deliver = 10
        ack_wait = dt.timedelta(seconds=9)

        def handle(self, message: Order, context: MessageContext) -> Any:
            return self, message, context

    subscription = one(registry)
    assert subscription.name == "http_audit_log"
    assert subscription.filter_subjects == ("test.*.order.*", "test.*.payment.>")
    assert (subscription.max_deliver, subscription.ack_wait) == (10, 9.0)
    assert subscription.decode({"order_id": 1}) == Order(1)
    assert subscription.handler("m", CONTEXT)[1:] == ("m", CONTEXT)


def test_a_class_may_take_the_message_alone_and_be_async(pubsub: Any, registry: Registry) -> None:
    class Audit(Subscriber, pubsub=pubsub):
        topics = "order.created"
        name = "audit-log"

        async def handle(self, message: Any) -> Any: ...

    subscription = one(registry)
    assert subscription.topics == ("order.created",)
    assert subscription.durable == "shop-audit-log"
    assert subscription.is_async


def test_each_app_has_an_instance_of_its_own(pubsub: Any, registry: Registry) -> None:
    class Audit(Subscriber, pubsub=pubsub):
        topics = "a"

        def handle(self, message: Any) -> Any:
            return self

    first = one(registry).handler({}, CONTEXT)
    second = one(registry, Settings(app_name="other")).handler({}, CONTEXT)
    assert isinstance(first, Audit)
    assert first is not second


def test_a_class_that_needs_arguments_is_refused(pubsub: Any, registry: Registry) -> None:
    class Audit(Subscriber, pubsub=pubsub):
        topics = "a"

        def __init__(self, database: Any) -> None: ...

        def handle(self, message: Any) -> Any: ...

    with pytest.raises(RegistrationError, match=r"cannot be instantiated .*'database'"):
        registry.resolve(SETTINGS)


def test_static_and_class_methods_can_handle(pubsub: Any, registry: Registry) -> None:
    class Static(Subscriber, pubsub=pubsub):
        topics = "a"

        @staticmethod
        def handle(message: Any) -> Any:
            return message

    class OfClass(Subscriber, pubsub=pubsub):
        topics = "a"

        @classmethod
        def handle(cls, message: Any) -> Any:
            return message

    assert [s.handler("m", CONTEXT) for s in registry.resolve(SETTINGS)] == ["m", "m"]


def test_an_abstract_class_is_only_a_base(pubsub: Any, registry: Registry) -> None:
    class Base(Subscriber, pubsub=pubsub):
        abstract = True
        max_deliver = 9

        def handle(self, message: Any) -> Any: ...

    class Audit(Base):
        topics = "a"

    subscription = one(registry)
    assert (subscription.name, subscription.max_deliver) == ("audit", 9)


def test_a_class_without_a_handle_method_is_refused(pubsub: Any) -> None:
    with pytest.raises(RegistrationError, match=r"no method handle.*abstract = True"):

        class Audit(Subscriber, pubsub=pubsub):
            topics = "a"


def test_a_class_without_topics_is_refused(pubsub: Any) -> None:
    with pytest.raises(RegistrationError, match=r"Subscriber 'audit' \(.*\) has no topics"):

        class Audit(Subscriber, pubsub=pubsub):
            def handle(self, message: Any) -> Any: ...


def test_a_class_with_a_bad_option_is_refused(pubsub: Any) -> None:
    with pytest.raises(RegistrationError, match=r"max_deliver is 0\. Allowed: a whole number"):

        class Audit(Subscriber, pubsub=pubsub):
            topics = "a"
            max_deliver = 0

            def handle(self, message: Any) -> Any: ...


def test_a_class_with_a_bad_handle_method_is_refused(pubsub: Any) -> None:
    with pytest.raises(RegistrationError, match=r"takes \(\)"):

        class Audit(Subscriber, pubsub=pubsub):
            topics = "a"

            def handle(self) -> Any: ...


def test_a_class_attribute_that_looks_like_an_option_warns(pubsub: Any) -> None:
    with pytest.warns(UserWarning, match=r"Audit\.max_delivery is no option .* mean max_deliver\?"):

        class Audit(Subscriber, pubsub=pubsub):
            topics = "a"
            max_delivery = 3
            shelf = "an attribute of its own"

            def handle(self, message: Any) -> Any: ...
