from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_natspubsub.errors import InvalidTopic
from flask_natspubsub.messages import subjects

CONCRETE = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")

tokens = st.sampled_from(["a", "b", "c"])
concrete = st.lists(tokens, min_size=1, max_size=4).map(".".join)
patterns = st.builds(
    lambda body, tail: ".".join([*body, *tail]),
    st.lists(st.sampled_from(["a", "b", "*"]), min_size=1, max_size=3),
    st.sampled_from([[], [">"]]),
)


def regex_of(pattern: str) -> re.Pattern[str]:
    """Translate a pattern independently of the code under test."""
    parts = {"*": r"[^.]+", ">": r"[^.]+(\.[^.]+)*"}
    return re.compile(r"\.".join(parts.get(p, re.escape(p)) for p in pattern.split(".")))


ALL_SUBJECTS = [
    ".".join(s) for n in range(1, 5) for s in itertools.product(["a", "b", "zz"], repeat=n)
]


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("my.shop app", "my_shop_app"),
        ("shop", "shop"),
        ("Shop-2", "Shop-2"),
        ("__main__", "main"),
        ("", "app"),
        ("...", "app"),
        ("日本", "app"),
        ("café.web", "caf_web"),
    ],
)
def test_slug_makes_one_token(name: str, token: str) -> None:
    assert subjects.slug(name) == token


@given(st.text())
def test_slug_is_always_a_token(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]+", subjects.slug(name))


@pytest.mark.parametrize(
    ("topic", "normal"),
    [
        ("order.created", "order.created"),
        ("Created!", "created_"),
        ("Order Placed/EU#1", "order_placed_eu_1"),
        ("a-b_c.D", "a-b_c.d"),
        ("a\r\nb", "a__b"),
    ],
)
def test_topics_are_normalised_one_for_one(topic: str, normal: str) -> None:
    assert subjects.normalize_topic(topic) == normal


@pytest.mark.parametrize(
    "topic",
    ["", "  ", "a..b", ".a", "a.", ".", "order.*", "order.>", ">", "a*b", "x>y", "\ud800"],
)
def test_what_no_message_can_be_about_is_refused(topic: str) -> None:
    with pytest.raises(InvalidTopic):
        subjects.normalize_topic(topic)
    with pytest.raises(InvalidTopic):
        subjects.subject_for("test", "shop", topic)


@pytest.mark.parametrize("topic", [None, 7, b"order.created", ["order.created"], {}])
def test_a_topic_that_is_not_text_is_refused(topic: object) -> None:
    with pytest.raises(InvalidTopic, match="is text, not"):
        subjects.normalize_topic(topic)  # type: ignore[arg-type]
    with pytest.raises(InvalidTopic):
        subjects.subject_for("test", "shop", topic)  # type: ignore[arg-type]
    with pytest.raises(InvalidTopic):
        subjects.filter_for("test", "shop", topic)  # type: ignore[arg-type]


@pytest.mark.parametrize("topic", ["order.*", "Order.>", "*", ">", "*.created"])
def test_subscriptions_may_have_wildcards(topic: str) -> None:
    assert subjects.normalize_topic(topic, wildcards=True) == topic.lower()


@pytest.mark.parametrize("topic", [">.a", "a.>.b", "order*", "a.b>", "**", "*.", "a..*"])
def test_wildcards_out_of_place_are_refused(topic: str) -> None:
    with pytest.raises(InvalidTopic):
        subjects.normalize_topic(topic, wildcards=True)


@given(st.text())
def test_a_normalised_topic_is_always_a_concrete_subject(topic: str) -> None:
    try:
        normal = subjects.normalize_topic(topic)
    except InvalidTopic:
        return
    assert CONCRETE.fullmatch(normal)
    assert subjects.check_filter(f"test.shop.{normal}"[:255].rstrip("."))
    assert subjects.normalize_topic(normal) == normal


def test_the_subject_is_env_app_and_topic() -> None:
    assert subjects.subject_for("production", "Shop", "Order.Created") == (
        "production.Shop.order.created"
    )
    assert subjects.topic_of("production.Shop.order.created") == "order.created"


@pytest.mark.parametrize("subject", ["orders", "orders.new"])
def test_a_subject_of_two_tokens_is_its_own_topic(subject: str) -> None:
    assert subjects.topic_of(subject) == subject


def test_a_subject_has_at_most_255_characters() -> None:
    longest = "a" * (255 - len("test.shop."))
    assert len(subjects.subject_for("test", "shop", longest)) == 255
    with pytest.raises(InvalidTopic, match="256 characters"):
        subjects.subject_for("test", "shop", longest + "a")
    with pytest.raises(InvalidTopic, match="256 characters"):
        subjects.filter_for("test", "shop", longest + "a")
    with pytest.raises(InvalidTopic, match="256 characters"):
        subjects.check_filter(f"test.shop.{longest}a")


def test_a_filter_may_be_for_every_producer() -> None:
    assert subjects.filter_for("test", "*", "order.>") == "test.*.order.>"
    assert subjects.filter_for("test", "shop", "order.*") == "test.shop.order.*"


@pytest.mark.parametrize("producer", ["", "a.b", ">", "my app", None])
def test_a_producer_is_one_token_or_all(producer: str) -> None:
    with pytest.raises(InvalidTopic, match="producer"):
        subjects.filter_for("test", producer, "order.created")


def test_publishing_stays_strict_after_a_subscription_was_cached() -> None:
    subjects.filter_for("test", "shop", "cached.*")
    with pytest.raises(InvalidTopic):
        subjects.subject_for("test", "shop", "cached.*")


def test_dead_letters_have_a_subject_for_each_subscriber() -> None:
    assert subjects.dead_letter_subject("test", "shop", "audit") == "test.dlq.shop.audit"
    with pytest.raises(InvalidTopic, match="subscriber"):
        subjects.dead_letter_subject("test", "shop", "a.b")


@pytest.mark.parametrize("subject", ["orders.new", "Orders.*", ">", "a.*.>", "$KV.x", "größe"])
def test_raw_subjects_are_taken_as_they_are(subject: str) -> None:
    assert subjects.check_filter(subject) == subject


@pytest.mark.parametrize(
    "subject",
    ["", "a b", "a\tb", "a\r\nb", "a..b", ".a", "a.", "a.>.b", "a*", "a\x00", "a\u2028b", "\udc00"],
)
def test_raw_subjects_that_nats_cannot_address_are_refused(subject: str) -> None:
    with pytest.raises(InvalidTopic):
        subjects.check_filter(subject)


def test_a_raw_subject_is_text() -> None:
    with pytest.raises(InvalidTopic):
        subjects.check_filter(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.*", "a", False),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a", True),
        ("*.b", "a.b", True),
        ("A.b", "a.b", False),
    ],
)
def test_matching_is_by_token(pattern: str, subject: str, expected: bool) -> None:
    assert subjects.matches(pattern, subject) is expected


@given(patterns, concrete)
def test_matching_agrees_with_a_regular_expression(pattern: str, subject: str) -> None:
    assert subjects.matches(pattern, subject) == bool(regex_of(pattern).fullmatch(subject))


@given(patterns, patterns)
def test_covering_and_overlapping_agree_with_all_short_subjects(one: str, other: str) -> None:
    ours = {s for s in ALL_SUBJECTS if regex_of(one).fullmatch(s)}
    theirs = {s for s in ALL_SUBJECTS if regex_of(other).fullmatch(s)}
    assert subjects.overlaps(one, other) == bool(ours & theirs)
    assert subjects.overlaps(other, one) == bool(ours & theirs)
    if subjects.covers(one, other):
        assert theirs <= ours
    elif len(one.split(".")) < 4 and len(other.split(".")) < 4:
        assert not theirs <= ours
