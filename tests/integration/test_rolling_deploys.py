"""Versions of one subscriber side by side: what one of them needs, none takes away."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from flask_natspubsub.brokers import agreement
from flask_natspubsub.brokers.jetstream import presence, strangers
from flask_natspubsub.brokers.jetstream import pull as pull_module
from flask_natspubsub.worker.worker import Worker
from tests.support.waiting import eventually

from .conftest import MakeShop
from .helpers import api
from .shop import Recorder, Shop

pytestmark = pytest.mark.real_server


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds takes less here; the order of things is the same."""
    hurried = pull_module.TIMING._replace(look=1.0, first_look=0.5, heartbeat=0.5)
    monkeypatch.setattr(pull_module, "TIMING", hurried)
    monkeypatch.setattr(strangers, "HAND_BACK", 0.1)
    monkeypatch.setattr(strangers, "LONGEST_HAND_BACK", 0.2)
    monkeypatch.setattr(presence, "WAIT", 0.3)


def version(make_shop: MakeShop, *topics: str, **options: Any) -> tuple[Shop, Recorder]:
    """Make a shop with a version of its subscriber ``bill``."""
    shop = make_shop()
    return shop, shop.record(*topics, name="bill", **options)


def filters(shop: Shop) -> set[str]:
    info = shop.consumer("bill")
    assert info is not None
    return set(info.filter_subjects)


def subjects(shop: Shop, *topics: str) -> set[str]:
    return {shop.subject(topic) for topic in topics}


def change_by_hand(shop: Shop, **changes: Any) -> None:
    """Change the consumer as the landed version of this package did, which asked nobody."""
    stream, durable = shop.settings.stream, "shop-bill"
    url = shop.settings.urls[0]
    config = api(url, f"CONSUMER.INFO.{stream}.{durable}")["config"] | changes
    config.pop("filter_subject", None)
    answer = api(
        url, f"CONSUMER.CREATE.{stream}.{durable}", {"stream_name": stream, "config": config}
    )
    assert "error" not in answer, answer


def topics_of(recorder: Recorder) -> list[str]:
    return [context.topic for context in recorder.contexts]


def publish(shop: Shop, topics: Sequence[str], count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        for topic in topics:
            shop.publish(topic, number)


def test_an_old_process_takes_no_topic_away(make_shop: MakeShop) -> None:
    old, old_got = version(make_shop, "order.created")
    new, new_got = version(make_shop, "order.created", "order.cancelled")
    worker = new.work()
    old_worker = old.work()
    assert filters(new) == subjects(new, "order.created", "order.cancelled")
    publish(new, ["order.created", "order.cancelled"], 10)
    eventually(lambda: topics_of(new_got).count("order.cancelled") == 10, 20)
    new.wait_until_settled("bill")
    assert "order.cancelled" not in topics_of(old_got), "the old handler does not know these"
    assert len(old_got.calls) + len(new_got.calls) == 20
    assert worker.is_healthy
    assert old_worker.is_healthy
    old_worker.stop()
    publish(new, ["order.cancelled"], 5, start=10)
    eventually(lambda: topics_of(new_got).count("order.cancelled") == 15)


def test_a_renamed_topic_is_heard_by_each_version_as_long_as_it_runs(make_shop: MakeShop) -> None:
    old, old_got = version(make_shop, "order.created", "order.gone")
    new, new_got = version(make_shop, "order.created", "order.cancelled")
    old_worker = old.work()
    new.work()
    assert filters(new) == subjects(new, "order.created", "order.gone", "order.cancelled")
    publish(new, ["order.gone", "order.cancelled"], 10)
    eventually(lambda: topics_of(new_got).count("order.cancelled") == 10, 20)
    eventually(lambda: topics_of(old_got).count("order.gone") == 10, 20)
    assert "order.gone" not in topics_of(new_got)
    assert "order.cancelled" not in topics_of(old_got)
    old_worker.stop()
    eventually(lambda: filters(new) == subjects(new, "order.created", "order.cancelled"), 20)


def test_an_old_process_that_starts_alone_keeps_what_the_newer_had(make_shop: MakeShop) -> None:
    """The only new process is being restarted at that moment."""
    old, old_got = version(make_shop, "order.created")
    new, new_got = version(make_shop, "order.created", "order.cancelled")
    old.work().stop()
    new.work().stop()
    old_worker = old.work()
    publish(new, ["order.created", "order.cancelled"], 5)
    eventually(lambda: topics_of(old_got).count("order.created") == 5)
    assert filters(new) == subjects(new, "order.created", "order.cancelled")
    new.work()
    eventually(lambda: topics_of(new_got).count("order.cancelled") == 5, 20)
    assert "order.cancelled" not in topics_of(old_got)
    assert old_worker.is_healthy


def test_a_deploy_that_is_rolled_back_ends_with_the_old_topics(
    make_shop: MakeShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_natspubsub.brokers.jetstream.consumer_api.GRACE", 2.0)
    old, old_got = version(make_shop, "order.created")
    new, _ = version(make_shop, "order.created", "order.cancelled")
    old.work().stop()
    new.work().stop()
    old.work()
    publish(old, ["order.created", "order.cancelled"], 5)
    eventually(lambda: filters(old) == subjects(old, "order.created"), 20)
    old.wait_until_settled("bill")
    assert topics_of(old_got) == ["order.created"] * 5
    info = old.consumer("bill")
    assert info is not None
    declared = agreement.Needs(tuple(subjects(old, "order.created")), 30.0, 2000)
    assert agreement.history_of(info.metadata)[-1] == declared.fingerprint


def test_an_ordered_subscriber_is_not_held_up_after_a_rollback(
    make_shop: MakeShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_natspubsub.brokers.jetstream.consumer_api.CROWDED_GRACE", 1.0)
    old, old_got = version(make_shop, "order.created", ordered=True)
    new, _ = version(make_shop, "order.created", "order.cancelled", ordered=True)
    old.work().stop()
    new.work().stop()
    old.work()
    publish(old, ["order.cancelled", "order.created"], 5)
    eventually(lambda: _seen(old_got, "order.created") == [*range(5)], 20)
    assert topics_of(old_got) == ["order.created"] * 5


def test_a_topic_that_was_removed_is_gone_at_once(make_shop: MakeShop) -> None:
    old, _ = version(make_shop, "order.created", "order.gone")
    new, got = version(make_shop, "order.created")
    old.work().stop()
    new.work()
    assert filters(new) == subjects(new, "order.created")
    publish(new, ["order.gone", "order.created"], 3)
    eventually(lambda: topics_of(got) == ["order.created"] * 3)


def test_a_consumer_that_lost_a_topic_gets_it_back_and_what_it_missed(
    make_shop: MakeShop, caplog: pytest.LogCaptureFixture
) -> None:
    shop, got = version(make_shop, "order.created", "order.cancelled")
    worker = shop.work()
    publish(shop, ["order.created", "order.cancelled"], 5)
    got.wait(10)
    shop.wait_until_settled("bill")
    change_by_hand(shop, filter_subjects=[shop.subject("order.created")])
    publish(shop, ["order.cancelled", "order.created"], 20, start=5)
    eventually(lambda: len({*_seen(got, "order.cancelled")}) == 25, 20)
    assert filters(shop) == subjects(shop, "order.created", "order.cancelled")
    eventually(lambda: worker.is_healthy)
    said = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert len([one for one in said if "not as declared" in one]) == 1
    assert any("may have been passed over" in one for one in said)
    missed = f"{shop.settings.stream}", "shop-bill-missed"
    eventually(lambda: shop.state.broker().consumer_info(*missed) is None, 20)


def _seen(recorder: Recorder, topic: str) -> list[int]:
    return [message["n"] for message, context in recorder.calls if context.topic == topic]


def test_what_was_missed_is_gone_on_with_after_a_restart(make_shop: MakeShop) -> None:
    shop = make_shop()
    stuck = shop.record("order.created", "order.cancelled", name="bill", then=shop.hang)
    worker = shop.work()
    eventually(lambda: worker.is_healthy)
    change_by_hand(shop, filter_subjects=[shop.subject("order.created")])
    publish(shop, ["order.cancelled"], 20)
    eventually(lambda: stuck.calls, 20)  # it has begun to catch up
    worker.hand_back_all()
    worker.stop(0.1)
    again, got = version(make_shop, "order.created", "order.cancelled")
    again.work()
    eventually(lambda: len({*_seen(got, "order.cancelled")}) == 20, 40)


def test_a_consumer_that_cannot_be_mended_is_unhealthy(
    make_shop: MakeShop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shop, _ = version(make_shop, "order.created", "order.cancelled")
    worker = shop.work()
    eventually(lambda: worker.is_healthy)

    async def refused(*_: object) -> None:
        raise pull_module.NatsPubsubError("the server does not let this user send to it")

    (consumer,) = worker._consumers
    pull: Any = consumer._consumption
    monkeypatch.setattr(pull._api, "_create", refused)
    change_by_hand(shop, filter_subjects=[shop.subject("order.created")])
    eventually(lambda: not worker.checks()["subscriber bill"], 20)
    said = eventually(lambda: [text for text in caplog.messages if "not as declared" in text])
    assert len(said) == 1
    assert "order.cancelled" in said[0]
    monkeypatch.undo()
    eventually(lambda: worker.is_healthy, 20)


def test_the_longer_ack_wait_counts_while_somebody_needs_it(make_shop: MakeShop) -> None:
    new, _ = version(make_shop, "order.created", ack_wait=60)
    old, _ = version(make_shop, "order.created", ack_wait=20)
    worker = new.work()
    old.work()
    assert _ack_wait(new) == 60
    worker.stop()
    third, _ = version(make_shop, "order.created", ack_wait=25)
    third.work()
    assert _ack_wait(new) == 25


def _ack_wait(shop: Shop) -> float:
    found = api(shop.settings.urls[0], f"CONSUMER.INFO.{shop.settings.stream}.shop-bill")
    return float(found["config"]["ack_wait"] / 1e9)


def test_workers_of_one_process_are_asked_too(make_shop: MakeShop) -> None:
    shop, _ = version(make_shop, "order.created", "order.cancelled")
    first: Worker = shop.work()
    second: Worker = shop.work()
    assert first.is_healthy
    assert second.is_healthy
