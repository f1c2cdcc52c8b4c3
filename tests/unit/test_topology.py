"""Which streams an application needs, and what is planned when some are there already."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from flask_natspubsub import TopologyError
from flask_natspubsub.brokers.base import Change, StreamConfig, StreamInfo
from flask_natspubsub.brokers.topology import plan, wanted_streams
from flask_natspubsub.config.settings import Settings

DAY = 24 * 3600.0


def wanted(*filters: str, **settings: Any) -> list[StreamConfig]:
    return wanted_streams(Settings(env="test", **{"app_name": "shop", **settings}), filters)


def stream(name: str, *subjects: str, **options: Any) -> StreamInfo:
    return StreamInfo(config=StreamConfig(name=name, subjects=subjects, **options))


def applied(changes: list[Change], existing: list[StreamInfo]) -> list[StreamInfo]:
    """What the server has afterwards."""
    configs = {info.config.name: info.config for info in existing}
    configs |= {change.stream: change.config for change in changes if change.config}
    return [StreamInfo(config=config) for config in configs.values()]


def actions(changes: list[Change]) -> list[tuple[str, str]]:
    return [(change.action, change.stream) for change in changes]


# --- what is wanted


def test_there_is_a_main_stream_and_one_for_dead_letters() -> None:
    main, dead = wanted()

    assert main == StreamConfig(
        name="test-events-stream",
        subjects=("test.events.>", "test.shop.>"),
        max_age=7 * DAY,
        duplicate_window=120.0,
    )
    assert (main.storage, main.retention, main.discard, main.replicas) == (
        "file",
        "limits",
        "old",
        1,
    )
    assert dead == StreamConfig(
        name="test-events-stream-dlq", subjects=("test.dlq.>",), max_age=30 * DAY
    )


def test_without_dead_letters_there_is_the_main_stream_only() -> None:
    assert [one.name for one in wanted(use_dlq=False)] == ["test-events-stream"]


def test_settings_shape_the_main_stream_and_its_storage_goes_for_the_other_too() -> None:
    main, dead = wanted(
        stream_name="mine",
        stream_config={"max_age": 60.0, "discard": "new", "storage": "memory", "replicas": 3},
    )

    assert (main.name, main.max_age, main.discard) == ("mine", 60.0, "new")
    assert (dead.name, dead.max_age, dead.discard) == ("mine-dlq", 30 * DAY, "old")
    assert (dead.storage, dead.replicas) == (main.storage, main.replicas) == ("memory", 3)


@pytest.mark.parametrize(
    ("subscribed", "stored"),
    [
        ("test.billing.invoice.*", ("test.billing.>",)),
        ("test.shop.order.created", ()),
        ("test.*.order.created", ()),
        ("test.>", ()),
        ("test.dlq.>", ()),
        ("other.billing.>", ()),
    ],
)
def test_what_another_app_will_publish_is_stored_from_the_first_subscription_on(
    subscribed: str, stored: tuple[str, ...]
) -> None:
    assert wanted(subscribed)[0].subjects == ("test.events.>", "test.shop.>", *stored)


# --- what is planned


def test_on_an_empty_server_all_is_created() -> None:
    changes = plan(wanted(), [])

    assert actions(changes) == [
        ("create", "test-events-stream"),
        ("create", "test-events-stream-dlq"),
    ]
    assert [change.config for change in changes] == wanted()
    assert changes[0].detail == "test.events.>, test.shop.>"


def test_a_second_time_nothing_is_done() -> None:
    existing = applied(plan(wanted(), []), [])

    assert {change.action for change in plan(wanted(), existing)} == {"ok"}


def test_another_app_adds_its_subject_and_changes_nothing_else() -> None:
    existing = [stream("test-events-stream", "test.events.>", "test.shop.>", max_msgs=5, max_age=9)]

    changes = plan(wanted(app_name="billing", use_dlq=False), existing)

    assert actions(changes) == [("add_subjects", "test-events-stream")]
    assert changes[0].detail == "test.billing.>"
    assert changes[0].config == msgspec.structs.replace(
        existing[0].config, subjects=("test.events.>", "test.shop.>", "test.billing.>")
    )


def test_a_wider_subject_counts_as_present() -> None:
    existing = [stream("test-events-stream", "test.*.>", "other.>")]

    assert actions(plan(wanted(use_dlq=False), existing)) == [("ok", "test-events-stream")]


def test_a_main_stream_that_takes_the_dead_letters_too_is_used_for_them() -> None:
    existing = [stream("test-events-stream", "test.>")]

    changes = plan(wanted(), existing)

    assert actions(changes) == [("ok", "test-events-stream"), ("ok", "test-events-stream")]
    assert changes[1].detail == "keeps test.dlq.> as well"


def test_an_overlap_with_a_foreign_stream_is_an_error_that_names_both() -> None:
    existing = [stream("theirs", "*.shop.orders")]

    with pytest.raises(TopologyError) as caught:
        plan(wanted(), existing)

    for name in ("test-events-stream", "test.shop.>", "theirs", "*.shop.orders"):
        assert repr(name) in str(caught.value)
    assert "NATSPUBSUB_STREAM_NAME" in caught.value.fix


def test_a_foreign_stream_with_a_subject_that_we_have_already_is_not_our_affair() -> None:
    existing = [stream("test-events-stream", "test.events.>", "test.shop.>"), stream("x", "test.x")]

    assert actions(plan(wanted(use_dlq=False), existing)) == [("ok", "test-events-stream")]


def test_differences_are_reported_and_left() -> None:
    subjects = wanted()[0].subjects
    existing = [stream("test-events-stream", *subjects, storage="memory", replicas=3)]

    changes = plan(wanted(use_dlq=False), existing)

    assert [(change.action, change.detail) for change in changes] == [
        ("differs", "storage is 'memory', not 'file'"),
        ("differs", "replicas is 3, not 1"),
    ]
    assert all(change.config is None for change in changes)


@pytest.mark.parametrize(("retention", "words"), [("workqueue", "Ruby"), ("interest", "'limits'")])
def test_another_retention_is_reported_with_what_it_makes_impossible(
    retention: str, words: str
) -> None:
    existing = [stream("test-events-stream", *wanted()[0].subjects, retention=retention)]

    (change,) = plan(wanted(use_dlq=False), existing)

    assert change.action == "differs"
    assert retention in change.detail
    assert words in change.detail


def test_a_stream_may_lack_subjects_and_differ_at_once() -> None:
    existing = [stream("test-events-stream", "test.events.>", retention="workqueue")]

    changes = plan(wanted(use_dlq=False), existing)

    assert [change.action for change in changes] == ["add_subjects", "differs"]
    assert changes[0].config is not None
    assert changes[0].config.retention == "workqueue"
