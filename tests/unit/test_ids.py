from __future__ import annotations

import datetime as dt
import os
import re
import select
import signal
import threading
import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_natspubsub.errors import EncodingError
from flask_natspubsub.messages import ids

aware_datetimes = st.datetimes(
    min_value=dt.datetime(2, 1, 1),
    max_value=dt.datetime(9998, 12, 31),
    timezones=st.builds(
        lambda minutes: dt.timezone(dt.timedelta(minutes=minutes)), st.integers(-840, 840)
    ),
)


def test_an_event_id_is_a_uuid_of_version_7_with_the_time_in_it() -> None:
    before = time.time_ns() // 1_000_000
    parsed = uuid.UUID(text := ids.new_event_id())
    after = time.time_ns() // 1_000_000
    assert str(parsed) == text
    assert parsed.version == 7
    assert parsed.variant == uuid.RFC_4122
    assert before <= parsed.int >> 80 <= after + 1


def test_event_ids_of_one_thread_increase() -> None:
    made = [ids.new_event_id() for _ in range(5000)]
    assert made == sorted(set(made))


def test_event_ids_of_many_threads_are_unique_and_increase_in_each() -> None:
    lists: list[list[str]] = [[] for _ in range(8)]
    start = threading.Barrier(8)

    def make(into: list[str]) -> None:
        start.wait()
        into.extend(ids.new_event_id() for _ in range(2000))

    threads = [threading.Thread(target=make, args=(into,)) for into in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(made == sorted(made) for made in lists)
    assert len({event_id for made in lists for event_id in made}) == 16_000


def test_event_ids_increase_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    first = ids.new_event_id()
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000_000)
    made = [first, *(ids.new_event_id() for _ in range(100))]
    assert made == sorted(set(made))
    assert {uuid.UUID(event_id).version for event_id in made} == {7}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_makes_ids_far_from_its_parents() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, ids.new_event_id().encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        assert select.select([reader], [], [], 10)[0], "the child is stuck"
        made = os.read(reader, 100).decode()
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert uuid.UUID(made).version == 7
    # The digits of the counter: a child that went on with its parent's would have the next.
    assert made[15:28] != ids.new_event_id()[15:28]


def test_a_derived_id_is_the_same_every_time() -> None:
    derived = ids.derived_event_id("order-1-created", "notification.email")
    # Written down: another id would be another message to a receiver of both.
    assert derived == "35cf15e6-1f8f-5589-8f42-8669e127ad90"
    assert uuid.UUID(derived).version == 5


def test_derived_ids_differ_by_id_and_topic() -> None:
    made = {ids.derived_event_id(i, t) for i in ("a", "a.b", "b") for t in ("b.c", "c", "a")}
    assert len(made) == 9


def test_a_timestamp_is_utc_with_milliseconds_cut_not_rounded() -> None:
    moment = dt.datetime(2025, 1, 2, 3, 4, 5, 678999, tzinfo=dt.UTC)
    assert ids.format_timestamp(moment) == "2025-01-02T03:04:05.678Z"
    assert ids.format_timestamp(moment.replace(microsecond=0)) == "2025-01-02T03:04:05.000Z"
    plus_two = moment.astimezone(dt.timezone(dt.timedelta(hours=2)))
    assert ids.format_timestamp(plus_two) == "2025-01-02T03:04:05.678Z"


@pytest.mark.parametrize(
    "moment",
    [
        dt.datetime(2025, 1, 2),
        dt.date(2025, 1, 2),
        "2025-01-02T03:04:05Z",
        None,
        dt.datetime.min.replace(tzinfo=dt.timezone(dt.timedelta(hours=1))),
    ],
)
def test_what_is_no_moment_in_utc_is_refused(moment: dt.datetime) -> None:
    with pytest.raises(EncodingError) as caught:
        ids.format_timestamp(moment)
    assert caught.value.path == "occurred_at"


@pytest.mark.parametrize(
    ("text", "microsecond"),
    [
        ("2025-01-02T03:04:05Z", 0),
        ("2025-01-02T03:04:05.6Z", 600_000),
        ("2025-01-02T03:04:05.678Z", 678_000),
        ("2025-01-02T03:04:05.678901Z", 678_901),
        ("2025-01-02T03:04:05.678901999Z", 678_901),
        ("2025-01-02T05:04:05.678+02:00", 678_000),
        ("2025-01-02T05:04:05+0200", 0),
        ("2025-01-02 01:04:05-02", 0),
        ("2025-01-02t03:04:05z", 0),
    ],
)
def test_timestamps_of_all_packages_are_read(text: str, microsecond: int) -> None:
    moment = ids.parse_timestamp(text)
    assert moment == dt.datetime(2025, 1, 2, 3, 4, 5, microsecond, tzinfo=dt.UTC)
    assert moment.tzinfo is dt.UTC


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yesterday",
        "2025-01-02",
        "2025-01-02T03:04:05",
        "2025-01-02T03:04:05.Z",
        "2025-01-02T03:04:05.1234567890Z",
        "2025-13-02T03:04:05Z",
        "2025-01-02T25:04:05Z",
        "2025-01-02T03:04:05Z\n",
        "0001-01-01T00:00:00+05:00",
        "٢٠٢٥-01-02T03:04:05Z",
    ],
)
def test_other_texts_are_no_timestamps(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the type is the contract
        ids.parse_timestamp(text)


@given(aware_datetimes)
def test_a_timestamp_reads_back_to_the_millisecond(moment: dt.datetime) -> None:
    back = ids.parse_timestamp(ids.format_timestamp(moment))
    assert back == moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def test_now_is_written_like_any_other_time() -> None:
    before = dt.datetime.now(dt.UTC)
    text = ids.now_timestamp()
    after = dt.datetime.now(dt.UTC)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
    assert ids.format_timestamp(before) <= text <= ids.format_timestamp(after)
