"""What an extension object collects and makes of it for an app."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flask_natspubsub.config.settings import Settings
from flask_natspubsub.errors import RegistrationError
from flask_natspubsub.middleware import compose
from flask_natspubsub.subscribing.registry import Registry, SubscriberGroup
from flask_natspubsub.subscribing.subscriber import Subscriber, collect_local_classes

SETTINGS = Settings(env="test", app_name="shop")
ANY_CONTEXT: Any = object()


def names(registry: Registry, settings: Settings = SETTINGS) -> list[str]:
    return [subscription.name for subscription in registry.resolve(settings)]


def ship(message: Any) -> None: ...


@pytest.fixture
def registry() -> Registry:
    return Registry()


# --- functions ---------------------------------------------------------------------------


def test_the_decorator_returns_the_function_itself(registry: Registry) -> None:
    def send(message: Any) -> str:
        return f"sent {message}"

    assert registry.subscriber("order.created")(send) is send
    assert send("m") == "sent m"
    assert names(registry) == ["send"]


def test_subscriptions_come_in_order_of_declaration(registry: Registry) -> None:
    group = SubscriberGroup("group")
    registry.add_group(group)
    pubsub = SimpleNamespace(registry=registry)

    @group.subscriber("a")
    def third(message: Any) -> None: ...

    @registry.subscriber("a")
    def first(message: Any) -> None: ...

    class Second(Subscriber, pubsub=pubsub):
        topics = "a"

        def handle(self, message: Any) -> None: ...

    @group.subscriber("a")
    def fourth(message: Any) -> None: ...

    assert names(registry) == ["group-third", "first", "second", "group-fourth"]


def test_apps_with_other_settings_get_other_subscriptions(registry: Registry) -> None:
    @registry.subscriber("a")
    def send(message: Any) -> None: ...

    other = Settings(env="live", app_name="billing", max_deliver=2)
    (in_shop,), (in_billing,) = registry.resolve(SETTINGS), registry.resolve(other)
    assert (in_shop.durable, in_shop.filter_subjects) == ("shop-send", ("test.shop.a",))
    assert (in_billing.durable, in_billing.filter_subjects) == ("billing-send", ("live.billing.a",))
    assert in_billing.max_deliver == 2


def test_the_decorator_without_parentheses_is_refused(registry: Registry) -> None:
    with pytest.raises(RegistrationError, match=r"without topics\. Write @pubsub\.subscriber\("):

        @registry.subscriber  # type: ignore[arg-type]
        def send(message: Any) -> None: ...


def test_two_handlers_with_one_durable_name_are_refused(registry: Registry) -> None:
    def send(message: Any) -> None: ...

    def other(message: Any) -> None: ...

    registry.add(send, "a", name="send mail")
    registry.add(other, "a", name="send.mail")
    with pytest.raises(RegistrationError) as caught:
        registry.resolve(SETTINGS)
    first, second = send.__code__.co_firstlineno, other.__code__.co_firstlineno
    assert caught.value.message == (
        f"Subscriber 'send mail' ({__name__}:{first}) and Subscriber 'send.mail' "
        f"({__name__}:{second}) both have the durable name 'shop-send_mail'."
    )
    assert "name=" in caught.value.fix


def test_decorators_are_stacked_with_different_names(registry: Registry) -> None:
    @registry.subscriber("a", name="one")
    @registry.subscriber("b", name="two")
    def send(message: Any) -> None: ...

    assert [(s.name, s.topics) for s in registry.resolve(SETTINGS)] == [
        ("two", ("b",)),
        ("one", ("a",)),
    ]


def test_decorators_stacked_with_one_name_are_refused(registry: Registry) -> None:
    with pytest.raises(RegistrationError, match=r"both have the name 'send'\. List all topics"):

        @registry.subscriber("a")
        @registry.subscriber("b")
        def send(message: Any) -> None: ...

    assert names(registry) == ["send"]


def test_the_same_function_declared_again_counts_once(registry: Registry) -> None:
    def send(message: Any) -> None: ...

    registry.add(send, "a")
    registry.add(send, "a", max_deliver=2)
    (subscription,) = registry.resolve(SETTINGS)
    assert subscription.max_deliver == 2


def test_a_factory_called_twice_declares_its_handler_once(registry: Registry) -> None:
    def create_app(answer: str) -> None:
        @registry.subscriber("a")
        def send(message: Any) -> str:
            return answer

    create_app("old")
    registry.begin_app()
    create_app("new")
    (subscription,) = registry.resolve(SETTINGS)
    assert subscription.handler({}, ANY_CONTEXT) == "new"


def test_two_handlers_of_one_name_in_a_module_are_refused(registry: Registry) -> None:
    @registry.subscriber("order.created")
    def send(message: Any) -> None: ...

    with pytest.raises(RegistrationError, match="both have the name 'send'"):

        @registry.subscriber("order.cancelled")
        def send(message: Any) -> None: ...

    assert [one.topics for one in registry.resolve(SETTINGS)] == [("order.created",)]


def test_a_handler_made_twice_for_one_app_is_refused(registry: Registry) -> None:
    def declare(target: list[Any]) -> None:
        @registry.subscriber("order.created")
        def forward(message: Any) -> None:
            target.append(message)

    declare([])
    with pytest.raises(RegistrationError, match="both have the name 'forward'"):
        declare([])


def test_two_classes_of_one_name_in_a_module_are_refused() -> None:
    class Twice(Subscriber):
        topics = "order.created"

        def handle(self, message: Any) -> None: ...

    first = Twice
    with pytest.raises(RegistrationError, match="both have the name 'twice'"):

        class Twice(Subscriber):  # type: ignore[no-redef]
            topics = "order.cancelled"

            def handle(self, message: Any) -> None: ...

    assert names(Registry()) == ["twice"]
    del first, Twice


# --- classes -----------------------------------------------------------------------------


def define_unbound(answer: str = "") -> type[Subscriber]:
    class Unbound(Subscriber):
        topics = "a"

        def handle(self, message: Any) -> str:
            return answer

    return Unbound


def test_an_unbound_class_is_found_by_every_registry() -> None:
    cls = define_unbound()
    assert names(Registry()) == names(Registry()) == ["unbound"]
    del cls
    collect_local_classes()
    assert names(Registry()) == []


def test_a_class_of_a_factory_called_twice_counts_once() -> None:
    old, new = define_unbound("old"), define_unbound("new")
    (subscription,) = Registry().resolve(SETTINGS)
    assert subscription.handler({}, ANY_CONTEXT) == "new"
    del old, new, subscription


def test_a_bound_class_is_found_by_its_registry_only(registry: Registry) -> None:
    class Bound(Subscriber, pubsub=SimpleNamespace(registry=registry)):
        topics = "a"

        def handle(self, message: Any) -> None: ...

    assert names(registry) == ["bound"]
    assert names(Registry()) == []


def test_two_classes_with_one_name_are_refused(registry: Registry) -> None:
    pubsub = SimpleNamespace(registry=registry)

    class Audit(Subscriber, pubsub=pubsub):
        topics = "a"

        def handle(self, message: Any) -> None: ...

    class Other(Audit):
        name = "audit"

    with pytest.raises(RegistrationError, match="both have the durable name 'shop-audit'"):
        registry.resolve(SETTINGS)


def test_a_class_of_another_kind_cannot_be_bound(registry: Registry) -> None:
    with pytest.raises(RegistrationError, match="is no subscriber class"):
        registry.add_class(Path)  # type: ignore[arg-type]


# --- groups ------------------------------------------------------------------------------


def test_a_group_gives_name_prefix_producer_and_defaults(registry: Registry) -> None:
    orders = SubscriberGroup("orders", prefix="order", producer="*", max_deliver=9, ack_wait=3)
    registry.add_group(orders)

    @orders.subscriber("created", "deleted")
    def notify(message: Any) -> None: ...

    @orders.subscriber("paid", name="book", max_deliver=2, producer="billing")
    def anything(message: Any) -> None: ...

    notified, booked = registry.resolve(SETTINGS)
    assert notified.name == "orders-notify"
    assert notified.topics == ("order.created", "order.deleted")
    assert notified.filter_subjects == ("test.*.order.created", "test.*.order.deleted")
    assert (notified.max_deliver, notified.ack_wait) == (9, 3.0)
    assert (booked.name, booked.durable) == ("orders-book", "shop-orders-book")
    assert booked.filter_subjects == ("test.billing.order.paid",)
    assert (booked.max_deliver, booked.ack_wait) == (2, 3.0)


def test_a_raw_subject_in_a_group_has_no_prefix(registry: Registry) -> None:
    orders = SubscriberGroup("orders", prefix="order")
    orders.add(ship, subject="legacy.orders")
    registry.add_group(orders)
    (subscription,) = registry.resolve(SETTINGS)
    assert subscription.filter_subjects == ("legacy.orders",)


def test_a_group_counts_once_and_in_every_registry_it_is_added_to(registry: Registry) -> None:
    group = SubscriberGroup("group")
    other = Registry()
    for each in (registry, registry, other):
        each.add_group(group)
    group.add(ship, "a")
    assert names(registry) == names(other) == ["group-ship"]


def test_the_same_handler_may_stand_in_two_groups(registry: Registry) -> None:
    for name in ("one", "two"):
        group = SubscriberGroup(name)
        group.add(ship, "a")
        registry.add_group(group)
    assert names(registry) == ["one-ship", "two-ship"]


def test_a_group_and_a_plain_handler_with_one_name_are_refused(registry: Registry) -> None:
    group = SubscriberGroup("orders")
    group.add(ship, "a", name="send")
    registry.add_group(group)
    registry.add(ship, "b", name="orders-send")
    with pytest.raises(RegistrationError, match="both have the durable name 'shop-orders-send'"):
        registry.resolve(SETTINGS)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_delivers": 3}, "Group 'g': unknown option 'max_delivers'. Did you mean"),
        ({"max_deliver": 0}, "Group 'g': max_deliver is 0. Allowed"),
        ({"subject": "x"}, "Group 'g': unknown option 'subject'"),
        ({"middleware": "log"}, "Group 'g': middleware is 'log'. Allowed"),
    ],
)
def test_a_bad_option_of_a_group_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RegistrationError, match=text):
        SubscriberGroup("g", **options)


def test_a_group_needs_a_name() -> None:
    with pytest.raises(RegistrationError, match="Group '': name is ''"):
        SubscriberGroup("")


def test_only_a_group_can_be_added(registry: Registry) -> None:
    with pytest.raises(RegistrationError, match=r"'orders' is no group\. Pass a SubscriberGroup"):
        registry.add_group("orders")  # type: ignore[arg-type]


# --- middleware --------------------------------------------------------------------------


def tagging(tag: str) -> Any:
    return lambda _context, call_next: f"{tag}({call_next()})"


def test_middleware_is_global_then_of_the_group_then_of_the_subscriber(
    registry: Registry,
) -> None:
    group = SubscriberGroup("group", middleware=[tagging("group")])
    registry.add_group(group)
    group.add(lambda message: "handled", "a", name="a", middleware=[tagging("own")])
    group.middleware(tagging("group2"))
    registry.add_middleware(tagging("global"))
    registry.add_middleware(tagging("global2"))

    (subscription,) = registry.resolve(SETTINGS)
    run = compose(subscription.middleware, lambda context: subscription.handler({}, context))
    assert run("context") == "global(global2(group(group2(own(handled)))))"


def test_a_group_leaves_other_subscribers_without_its_middleware(registry: Registry) -> None:
    registry.add_group(SubscriberGroup("group", middleware=tagging("group")))
    registry.add(ship, "a")
    (subscription,) = registry.resolve(SETTINGS)
    assert subscription.middleware == ()


def test_the_same_middleware_is_added_once(registry: Registry) -> None:
    tag = tagging("x")
    registry.add_middleware(tag)
    registry.add_middleware(tag)
    registry.add(ship, "a")
    (subscription,) = registry.resolve(SETTINGS)
    assert subscription.middleware == (tag,)


def test_the_middleware_decorator_of_a_group_returns_the_function() -> None:
    tag = tagging("x")
    assert SubscriberGroup("group").middleware(tag) is tag


def test_middleware_must_be_callable(registry: Registry) -> None:
    with pytest.raises(RegistrationError, match="The middleware 'log' is not a function"):
        registry.add_middleware("log")  # type: ignore[arg-type]
