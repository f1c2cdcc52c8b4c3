"""What becomes of the consumer of a subscriber that was renamed or removed."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from flask_natspubsub.brokers.base import StreamConfig
from flask_natspubsub.config.settings import Settings
from flask_natspubsub.errors import TopologyError
from flask_natspubsub.subscribing.durables import complaints, delete, orphans, rename
from flask_natspubsub.subscribing.registry import Registry
from flask_natspubsub.subscribing.subscription import Subscription
from tests.support.waiting import eventually

from .helpers import Inbox, Place, ack


def settings_of(place: Place) -> Settings:
    return Settings(env=place.env, app_name="shop", stream_name=place.stream)


def subscriptions(place: Place, *names: str) -> Sequence[Subscription]:
    registry = Registry()
    for name in names:
        registry.add(lambda message: None, "order.*", name=name)
    return registry.resolve(settings_of(place))


def begin(place: Place, name: str) -> None:
    """Let a subscriber handle what there is, and stop."""
    (one,) = subscriptions(place, name)
    count, inbox = place.info().messages, Inbox(ack)
    pull = place.broker.consume(one.consumer_config(place.stream), inbox)
    pull.request(count)
    inbox.wait(count)
    place.wait_until_settled(one.durable)
    pull.stop()


def no_inbox(app: str, old: str, new: str) -> int:
    return 0


def test_a_renamed_subscriber_goes_on_where_the_old_one_was(place: Place) -> None:
    place.publish(b"1", b"2", b"3")
    begin(place, "old")
    place.publish(b"4")
    (new,) = subscriptions(place, "new")
    renamed: list[tuple[str, str, str]] = []

    done = rename(
        place.broker, settings_of(place), "old", new, lambda *names: renamed.append(names) or 5
    )

    assert renamed == [("shop", "old", "new")]
    assert (done.waiting, done.again, done.remembered) == (1, 0, 5)
    assert [info.durable for info in place.broker.consumers(place.stream)] == ["shop-new"]
    inbox = Inbox(ack)
    pull = place.broker.consume(new.consumer_config(place.stream), inbox)
    pull.request(10)
    inbox.wait_for(b"4")
    assert inbox.payloads == [b"4"]
    pull.stop()


def test_a_rename_that_was_cut_off_goes_on(place: Place) -> None:
    place.publish(b"1")
    begin(place, "old")
    (new,) = subscriptions(place, "new")
    place.broker.add_consumer(new.consumer_config(place.stream))  # and died here
    assert rename(place.broker, settings_of(place), "old", new, no_inbox).waiting == 0


@pytest.mark.parametrize("busy", ["old", "new"])
def test_a_rename_waits_for_the_workers_to_stop(place: Place, busy: str) -> None:
    place.publish(b"1")
    begin(place, "old")
    (new,) = subscriptions(place, "new")
    (pulling,) = subscriptions(place, busy)
    pull = place.broker.consume(pulling.consumer_config(place.stream), lambda delivery: None)
    pull.request(5)
    eventually(lambda: _is_pulled(place, pulling.durable), 10, "nobody pulls")

    with pytest.raises(TopologyError, match=r"Stop it|has begun already"):
        rename(place.broker, settings_of(place), "old", new, no_inbox)
    pull.stop()


def _is_pulled(place: Place, durable: str) -> bool:
    info = place.consumer_info(durable)
    return bool(info.waiting or info.delivered)


def test_there_is_nothing_to_rename(place: Place) -> None:
    (new,) = subscriptions(place, "new")
    with pytest.raises(TopologyError, match="no consumer of a subscriber 'old'"):
        rename(place.broker, settings_of(place), "old", new, no_inbox)


def test_the_position_of_a_removed_subscriber_is_deleted(place: Place) -> None:
    place.publish(b"1")
    begin(place, "gone")
    place.publish(b"2")
    asked: list[int] = []

    info = delete(
        place.broker, settings_of(place), "gone", [], lambda found: asked.append(found.pending)
    )

    assert (asked, info.durable) == ([1], "shop-gone")
    assert place.broker.consumers(place.stream) == []


def test_a_consumer_of_another_app_is_not_deleted(place: Place) -> None:
    place.publish(b"1")
    other = place.consumer("shop-eu-new", app="shop-eu", subscriber="new")
    place.broker.add_consumer(other)
    with pytest.raises(TopologyError, match="no consumer of a subscriber 'eu-new'"):
        delete(place.broker, settings_of(place), "eu-new", [], lambda info: None)
    assert orphans(place.broker, settings_of(place), []) == []


def test_what_no_subscriber_has_is_named_and_so_is_who_begins_in_its_place(place: Place) -> None:
    place.publish(b"1")
    begin(place, "old")
    declared = subscriptions(place, "new", "other")
    begin(place, "other")

    lines = complaints(place.broker, settings_of(place), declared)

    assert len(lines) == 2
    assert "'shop-old' has no subscriber in the app 'shop' any more" in lines[0]
    assert "subscribers rename old NEW" in lines[0]
    assert "'new' is new and begins with all messages" in lines[1]
    assert "subscribers rename old new" in lines[1]
    assert complaints(place.broker, settings_of(place), subscriptions(place, "old", "other")) == []


def test_a_consumer_of_version_0_1_may_be_another_apps(place: Place) -> None:
    place.publish(b"1")
    (one,) = subscriptions(place, "old")
    config = msgspec.structs.replace(one.consumer_config(place.stream), app="", subscriber="")
    place.broker.add_consumer(config)
    (line,) = complaints(place.broker, settings_of(place), [])
    assert "(unless it is another app's)" in line


def test_a_subscriber_that_begins_with_what_is_stored_is_named(place: Place) -> None:
    declared = subscriptions(place, "first")
    assert complaints(place.broker, settings_of(place), declared) == []
    place.publish(b"1")
    (line,) = complaints(place.broker, settings_of(place), declared)
    assert line.startswith("the subscriber 'first' is new and begins with all messages")
    begin(place, "first")
    assert complaints(place.broker, settings_of(place), declared) == []


def test_a_subscriber_to_another_stream_is_renamed_there(place: Place) -> None:
    place.broker.setup([StreamConfig(name=f"{place.env}-x", subjects=(f"{place.env}-x.>",))])
    made = []
    for name in ("old", "new"):
        registry = Registry()
        registry.add(lambda message: None, name=name, subject=f"{place.env}-x.>")
        made += registry.resolve(settings_of(place))
    old, new = made
    at = place.broker.place(old.consumer_config(place.stream))
    assert at.stream == f"{place.env}-x"
    place.broker.add_consumer(at)

    rename(place.broker, settings_of(place), "old", new, no_inbox)

    (moved,) = place.broker.consumers(f"{place.env}-x")
    assert moved.durable == f"{place.env}-shop-new"
    delete(place.broker, settings_of(place), "new", [new], lambda info: None)
    assert place.broker.consumers(f"{place.env}-x") == []
