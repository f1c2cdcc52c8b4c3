"""What names things for good."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flask_natspubsub.messages import identity

APP = st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True)
#: As the consumer and the dead letters of a subscriber are named.
NAME = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,6}[A-Za-z0-9]", fullmatch=True)
ID = st.text(min_size=1, max_size=8)


@given(APP, NAME, APP, NAME)
def test_two_subscribers_have_two_keys(app: str, name: str, other: str, its: str) -> None:
    same = (app, name) == (other, its)
    assert (identity.subscriber_key(app, name) == identity.subscriber_key(other, its)) is same


HANDLING = st.tuples(APP, NAME, APP, ID)


@given(HANDLING, HANDLING)
def test_two_events_for_two_subscribers_have_two_keys(
    one: tuple[str, str, str, str], other: tuple[str, str, str, str]
) -> None:
    keys = []
    for app, name, producer, event_id in (one, other):
        made = identity.handling(app, name, f"test.{producer}.order.created", event_id)
        keys.append((made.event, made.subscriber))
    assert (keys[0] == keys[1]) is (one == other)


@given(HANDLING, st.integers(1, 99), st.floats(1e9, 2e9))
def test_no_event_has_the_key_of_a_message_without_an_id(
    one: tuple[str, str, str, str], sequence: int, stored_at: float
) -> None:
    app, name, producer, _ = one
    unnamed = identity.unnamed_handling(app, name, "stream", sequence, stored_at)
    named = identity.handling(app, name, f"test.{producer}.a", unnamed.event)
    assert (named.event, named.subscriber) != (unnamed.event, unnamed.subscriber)


def test_a_place_is_another_once_the_stream_was_made_anew() -> None:
    assert identity.place_key("s", 7, 1_750_000_000.0) == "s:7:1750000000000"
    assert identity.place_key("s", 7, 1_750_000_000.0) != identity.place_key("s", 7, 1_750_000_001)


def test_a_long_key_fits_into_its_column() -> None:
    names = [f"{'x' * 200}{end}" for end in "ab"]
    keys = {identity.handling("shop", name, "test.billing.a", "e1").subscriber for name in names}
    assert len(keys) == 2
    assert all(len(key) <= identity.MAX_KEY_LENGTH for key in keys)


def test_the_events_of_an_app_itself_have_plain_keys() -> None:
    own = identity.handling("shop", "mailer", "test.shop.order.created", "e1")
    assert (own.event, own.subscriber) == ("e1", "shop/mailer")
    raw = identity.handling("shop", "mailer", "orders", "e1")
    assert raw.subscriber == "shop/mailer"


def test_a_name_that_is_written_in_another_way_is_the_same_subscriber() -> None:
    assert identity.subscriber_key("shop", "send mail") == identity.subscriber_key(
        "shop", "send_mail"
    )
