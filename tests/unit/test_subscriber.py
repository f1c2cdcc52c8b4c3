"""Options, names and topics of subscribers, and the errors they are refused with."""

from __future__ import annotations

import datetime as dt
import functools
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from flask_natspubsub.config.settings import Settings
from flask_natspubsub.errors import InvalidTopic, RegistrationError
from flask_natspubsub.subscribing.options import OPTION_NAMES
from flask_natspubsub.subscribing.registry import Registry
from flask_natspubsub.subscribing.subscriber import Subscriber, SubscriberOptions
from flask_natspubsub.subscribing.subscription import Subscription

SETTINGS = Settings(env="test", app_name="shop")


def handle(message: Any, context: Any) -> Any:
    return message, context


def resolved(handler: Any, *topics: Any, settings: Settings = SETTINGS, **options: Any) -> Any:
    """Declare one handler and return its subscription."""
    registry = Registry()
    registry.add(handler, *topics, **options)
    return one(registry, settings)


def one(registry: Registry, settings: Settings = SETTINGS) -> Subscription:
    (subscription,) = registry.resolve(settings)
    return subscription


@pytest.fixture
def registry() -> Registry:
    return Registry()


# --- options -----------------------------------------------------------------------------


def test_options_default_to_the_settings() -> None:
    settings = Settings(
        env="test",
        app_name="shop",
        max_deliver=7,
        ack_wait=11.0,
        backoff=(2.0, 3.0),
        concurrency=6,
        handler_timeout=13.0,
        use_dlq=False,
    )
    subscription = resolved(handle, "order.created", settings=settings)
    assert msgspec.structs.replace(subscription, handler=None, decode=None) == Subscription(
        name="handle",
        app="shop",
        durable="shop-handle",
        topics=("order.created",),
        filter_subjects=("test.shop.order.created",),
        handler=None,  # type: ignore[arg-type]
        decode=None,  # type: ignore[arg-type]
        is_async=False,
        max_deliver=7,
        ack_wait=11.0,
        backoff=(2.0, 3.0),
        concurrency=6,
        timeout=13.0,
        inbox=False,
        ordered=False,
        deliver_policy="all",
        dead_letter=False,
        middleware=(),
    )


def test_options_override_the_settings() -> None:
    subscription = resolved(
        handle,
        "order.created",
        name="send",
        max_deliver=2,
        ack_wait=dt.timedelta(minutes=1),
        backoff=[1, dt.timedelta(seconds=2)],
        concurrency=3,
        timeout=4,
        inbox=True,
        deliver_policy="new",
        dead_letter=False,
    )
    assert subscription.name == "send"
    assert subscription.durable == "shop-send"
    assert subscription.max_deliver == 2
    assert subscription.ack_wait == 60.0
    assert subscription.backoff == (1.0, 2.0)
    assert subscription.concurrency == 3
    assert subscription.timeout == 4.0
    assert subscription.inbox is True
    assert subscription.deliver_policy == "new"
    assert subscription.dead_letter is False


def test_an_option_of_none_is_the_default() -> None:
    assert resolved(handle, "a", max_deliver=None).max_deliver == SETTINGS.max_deliver


def test_the_inbox_defaults_to_the_setting_once_there_is_one() -> None:
    settings: Any = SimpleNamespace(
        **{name: getattr(SETTINGS, name) for name in SETTINGS.__struct_fields__}
    )
    settings.use_inbox = True
    assert resolved(handle, "a", settings=settings).inbox is True


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("name", "", "a text with at least one ASCII letter or digit"),
        ("name", 3, "a text with at least one ASCII letter or digit"),
        ("producer", "a.b", "the name of an app .*, or '\\*' for any app"),
        ("subject", 5, "a NATS subject such as"),
        ("max_deliver", 0, "a whole number, 1 or more"),
        ("max_deliver", True, "a whole number, 1 or more"),
        ("max_deliver", "5", "a whole number, 1 or more"),
        ("ack_wait", 0, "a number of seconds, or a timedelta, greater than 0"),
        ("ack_wait", "30", "a number of seconds, or a timedelta"),
        ("backoff", [], "a list of seconds"),
        ("backoff", [1, -1], "a number of seconds"),
        ("concurrency", 1.5, "a whole number, 1 or more"),
        ("timeout", -1, "a number of seconds, or a timedelta"),
        ("inbox", 1, "True or False"),
        ("ordered", "yes", "True or False"),
        ("deliver_policy", "first", "'all', 'new' or 'last'"),
        ("dead_letter", "no", "True or False"),
        ("middleware", [len, "log"], "a function \\(context, call_next\\), or a list of them"),
    ],
)
def test_a_bad_option_says_whose_which_what_and_what_is_allowed(
    registry: Registry, option: str, value: Any, allowed: str
) -> None:
    with pytest.raises(RegistrationError) as caught:
        registry.add(handle, **{"topics": ["a"], option: value})
    assert f"({__name__}:{handle.__code__.co_firstlineno}): {option} is {value!r}." in str(
        caught.value
    )
    assert caught.value.message.startswith("Subscriber ")
    with pytest.raises(RegistrationError, match=f"Allowed: {allowed}"):
        raise caught.value


def test_an_unknown_option_suggests_the_nearest(registry: Registry) -> None:
    with pytest.raises(RegistrationError, match=r"unknown option 'max_delivery'.*'max_deliver'\?"):
        registry.add(handle, "a", max_delivery=3)


def test_an_option_like_no_other_lists_them_all(registry: Registry) -> None:
    with pytest.raises(RegistrationError, match=r"Known options: name, producer, .*middleware"):
        registry.add(handle, "a", zzz=3)


def test_options_stand_in_one_table_with_a_documented_line_each() -> None:
    documented = SubscriberOptions.__doc__ or ""
    for name in OPTION_NAMES:
        assert f":param {name}:" in documented
        assert hasattr(Subscriber, name)


def test_an_ordered_subscriber_handles_one_message_at_a_time() -> None:
    subscription = resolved(handle, "a", ordered=True, concurrency=8)
    assert (subscription.concurrency, subscription.max_ack_pending) == (1, 1)


@pytest.mark.parametrize("concurrency", [1, 200])
def test_what_waits_for_its_retry_takes_no_room_of_what_is_new(concurrency: int) -> None:
    assert resolved(handle, "a", concurrency=concurrency).max_ack_pending >= 100_000


# --- names -------------------------------------------------------------------------------


def test_a_name_becomes_one_token_of_durable_and_subject() -> None:
    subscription = resolved(handle, "a", name="send mail.now!")
    assert subscription.name == "send mail.now!"
    assert subscription.durable == "shop-send_mail_now"
    assert subscription.token == "send_mail_now"


def test_callable_objects_and_partials_have_a_name_of_their_own() -> None:
    class SendSMS:
        def __call__(self, message: Any) -> None: ...

    assert resolved(SendSMS(), "a").name == "send_sms"
    assert resolved(functools.partial(handle), "a").name == "handle"


def test_a_lambda_needs_a_name(registry: Registry) -> None:
    with pytest.raises(RegistrationError, match=r"has no name of its own\. Give it one"):
        registry.add(lambda message: None, "a")
    registry.add(lambda message: None, "a", name="noop")
    assert one(registry).name == "noop"


# --- topics ------------------------------------------------------------------------------


def test_topics_may_be_given_one_by_one_in_a_list_or_by_name() -> None:
    assert resolved(handle, "a", "b").topics == ("a", "b")
    assert resolved(handle, ["a", "b"]).topics == ("a", "b")
    assert resolved(handle, topics=("a", "b")).topics == ("a", "b")


def test_topics_are_normalised_in_the_filter_only() -> None:
    subscription = resolved(handle, "Order.Created!")
    assert subscription.topics == ("Order.Created!",)
    assert subscription.filter_subjects == ("test.shop.order.created_",)


def test_the_producer_is_another_app_or_any() -> None:
    assert resolved(handle, "a", producer="billing").filter_subjects == ("test.billing.a",)
    assert resolved(handle, "a.>", producer="*").filter_subjects == ("test.*.a.>",)


def test_a_raw_subject_is_taken_as_it_is() -> None:
    subscription = resolved(handle, subject="legacy.ORDERS.>")
    assert subscription.topics == ()
    assert subscription.filter_subjects == ("legacy.ORDERS.>",)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [({"topics": ["a"], "subject": "x.a"}, "both topics and a subject"), ({}, "no topics")],
)
def test_either_topics_or_a_subject(
    registry: Registry, arguments: dict[str, Any], problem: str
) -> None:
    with pytest.raises(RegistrationError, match=rf"has {problem}\. Give either topics"):
        registry.add(handle, **arguments)


@pytest.mark.parametrize("topic", ["", "a..b", ".a", "a.>.b", "a.b*"])
def test_a_topic_that_cannot_be_addressed_names_the_subscriber(
    registry: Registry, topic: str
) -> None:
    with pytest.raises(InvalidTopic, match=r"^Subscriber 'handle' \(.*test_subscriber:\d+\): "):
        registry.add(handle, topic)


def test_a_bad_subject_names_the_subscriber(registry: Registry) -> None:
    with pytest.raises(InvalidTopic, match=r"^Subscriber 'handle' .*'a b'"):
        registry.add(handle, subject="a b")


def test_a_topic_that_is_no_text(registry: Registry) -> None:
    with pytest.raises(RegistrationError, match=r"a topic is 5\. Allowed: a text"):
        registry.add(handle, "a", 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("topics", "kept"),
    [
        (["a", "a", "A"], ["a"]),
        (["order.created", "order.*"], ["order.*"]),
        (["order.*", "order.created", "b"], ["order.*", "b"]),
        (["a.*", "*.b", ">"], [">"]),
        (["a.>", "a"], ["a.>", "a"]),
    ],
)
def test_topics_covered_by_another_are_not_asked_for_twice(
    topics: list[str], kept: list[str]
) -> None:
    subscription = resolved(handle, topics)
    assert subscription.topics == tuple(topics)
    assert subscription.filter_subjects == tuple(f"test.shop.{topic}" for topic in kept)


def test_topics_that_overlap_in_part_are_refused(registry: Registry) -> None:
    with pytest.raises(RegistrationError, match=r"'order\.\*' and '\*\.created' overlap"):
        registry.add(handle, "order.*", "*.created")
