"""What happens to one delivery, without a broker."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import datetime as dt
import gc
import logging
import pickle
import weakref
from dataclasses import dataclass

import pytest

from flask_natspubsub import DeadLetter, Discard, MessageContext, Retry, current_message
from flask_natspubsub.errors import (
    DatabaseError,
    HandlerInterrupted,
    HandlerTimeout,
    InboxBusy,
    PublishError,
)
from flask_natspubsub.messages.envelope import Lineage
from flask_natspubsub.observability.tracing import current_lineage
from flask_natspubsub.worker.async_handlers import AsyncHandlers

from .worker_helpers import FakeDelivery, Rig, envelope


@dataclass
class Order:
    id: int


def quiet(message):
    """A handler with nothing to do."""


def failing(error):
    def fail(message):
        raise error

    return fail


def must_not_run(message):
    raise AssertionError("the handler ran")


# --- the straight path


def test_a_handled_message_is_acked_after_its_app_context_is_gone():
    rig = Rig(lambda message, context: rig.events.append(message))
    delivery = FakeDelivery()
    delivery_at = rig.events.append

    class Watched(FakeDelivery):
        def ack(self):
            delivery_at("ack")
            super().ack()

    delivery = Watched()
    outcome = rig.processor.process(delivery)

    assert rig.events == ["enter", {"id": 1}, "leave", "ack"]
    assert delivery.fate == ("ack", None)
    assert outcome.result == "handled"
    assert outcome.detail == ""


def test_the_outcome_is_one_log_line_worth():
    outcome = Rig(quiet).processor.process(FakeDelivery(attempt=3))

    assert (outcome.topic, outcome.event_id, outcome.attempt) == ("order.created", "e1", 3)
    assert 0 <= outcome.seconds < 5


def test_the_context_tells_all_about_the_message():
    seen = []
    rig = Rig(lambda message, context: seen.append(context))
    data = envelope(
        {"id": 5},
        trace_id="t1",
        correlation_id="c1",
        causation_id="e0",
        producer="billing",
        occurred_at="2025-01-02T03:04:05.678Z",
        unknown="kept",
    )
    rig.processor.process(FakeDelivery(data, attempt=2, headers={"x": "y"}))

    (context,) = seen
    assert (context.event_id, context.topic) == ("e1", "order.created")
    assert (context.trace_id, context.correlation_id, context.causation_id) == ("t1", "c1", "e0")
    assert (context.producer, context.attempt, context.subscriber) == ("billing", 2, "mailer")
    assert (context.subject, context.stream, context.sequence) == (
        "test.shop.order.created",
        "test-events-stream",
        7,
    )
    assert context.occurred_at == dt.datetime(2025, 1, 2, 3, 4, 5, 678000, dt.UTC)
    assert context.published_at == dt.datetime.fromtimestamp(1_750_000_000, dt.UTC)
    assert context.headers == {"x": "y"}
    assert context.raw == data
    assert context.envelope["unknown"] == "kept"


def test_the_context_is_a_message_context_whole_or_changed():
    seen = []
    Rig(lambda message, context: seen.append(context)).processor.process(FakeDelivery())
    (context,) = seen

    changed = dataclasses.replace(context, topic="other")

    assert isinstance(changed, MessageContext)
    assert dataclasses.asdict(changed) == dataclasses.asdict(context) | {"topic": "other"}
    assert repr(changed) == "<MessageContext other e1 attempt 1>"
    for copied in (copy.copy(context), pickle.loads(pickle.dumps(context))):
        assert dataclasses.asdict(copied) == dataclasses.asdict(context)
    assert context.envelope is context.envelope
    with pytest.raises(AttributeError, match="no_such"):
        _ = context.no_such


def test_a_message_without_a_time_occurred_when_it_was_stored():
    seen = []
    Rig(lambda message, context: seen.append(context)).processor.process(FakeDelivery())

    assert seen[0].occurred_at == seen[0].published_at


def test_current_message_and_lineage_are_set_for_the_handler_only():
    seen = []

    def handler(message, context):
        seen.append((current_message.event_id, current_lineage()))

    data = envelope(trace_id="t1", correlation_id="c1", causation_id="e0")
    headers = {"traceparent": "00-11112222333344445555666677778888-1111222233334444-01"}
    Rig(handler).processor.process(FakeDelivery(data, headers=headers))

    event_id, lineage = seen[0]
    assert event_id == "e1"
    # What the handler publishes is caused by the message, not by what caused that.
    assert lineage == Lineage("t1", "c1", "e1", headers["traceparent"])
    assert current_lineage() == Lineage()
    with pytest.raises(RuntimeError, match="No message is being handled"):
        _ = current_message.event_id


def test_the_message_is_decoded_into_the_annotated_type():
    seen = []

    def handler(message: Order):
        seen.append(message)

    Rig(handler).processor.process(FakeDelivery())
    assert seen == [Order(id=1)]


def test_an_async_handler_is_awaited_with_the_time_limit():
    seen = []

    async def handler(message):
        seen.append(message)

    rig = Rig(handler, timeout=12)
    assert rig.processor.process(FakeDelivery()).result == "handled"
    assert seen == [{"id": 1}]
    assert ("async", 12.0) in rig.events


def test_middleware_runs_inside_the_app_context_and_may_leave_the_handler_out():
    def middleware(context, call_next):
        rig.events.append(context.topic)

    rig = Rig(must_not_run, middleware=[middleware])

    assert rig.processor.process(FakeDelivery()).result == "handled"
    assert rig.events == ["enter", "order.created", "leave"]


def test_a_replay_for_another_subscriber_is_acked_and_skipped():
    rig = Rig(must_not_run)
    delivery = FakeDelivery(headers={"x-replay-for": "audit"})

    assert rig.processor.process(delivery).result == "skipped"
    assert delivery.fate == ("ack", None)
    assert rig.events == []
    assert rig.signals == []


def test_a_replay_for_this_subscriber_is_handled():
    delivery = FakeDelivery(headers={"x-replay-for": "mailer"})
    assert Rig(quiet).processor.process(delivery).result == "handled"


# --- errors


def test_a_failed_message_is_delivered_again_after_the_backoff():
    rig = Rig(failing(ValueError("broken\nin two lines")))

    delivery = FakeDelivery()
    outcome = rig.processor.process(delivery)
    assert outcome.result == "retried"
    assert outcome.detail.startswith(r"ValueError: broken\nin two lines; again in ")
    assert 0.8 <= delivery.fate[1] <= 1.2

    delivery = FakeDelivery(attempt=2)
    rig.processor.process(delivery)
    assert delivery.fate[0] == "nak"
    assert 8 <= delivery.fate[1] <= 12


def test_retry_sets_its_own_delay_or_leaves_it_to_the_backoff():
    delivery = FakeDelivery()
    Rig(failing(Retry(33))).processor.process(delivery)
    assert delivery.fate == ("nak", 33.0)

    delivery = FakeDelivery()
    Rig(failing(Retry(delay=dt.timedelta(minutes=2)))).processor.process(delivery)
    assert delivery.fate == ("nak", 120.0)

    delivery = FakeDelivery()
    Rig(failing(Retry())).processor.process(delivery)
    assert 0.8 <= delivery.fate[1] <= 1.2


def test_discard_drops_the_message():
    rig = Rig(failing(Discard("not for us")))
    delivery = FakeDelivery()
    outcome = rig.processor.process(delivery)

    assert (outcome.result, outcome.detail) == ("discarded", "not for us")
    assert delivery.fate == ("ack", None)
    assert rig.box.stored == []


@pytest.mark.parametrize(
    ("error", "attempt", "reason"),
    [
        (DeadLetter("no such customer"), 1, "rejected"),
        (ValueError("broken"), 5, "handler_error"),
        (Retry(1), 5, "handler_error"),
        (ValueError("broken"), 6, "max_deliver_exceeded"),
        (SystemExit(3), 5, "handler_error"),
    ],
)
def test_a_message_given_up_on_is_stored_before_it_is_terminated(error, attempt, reason):
    rig = Rig(failing(error))
    delivery = FakeDelivery(attempt=attempt)
    outcome = rig.processor.process(delivery)

    assert rig.box.stored == [(delivery, reason, error)]
    assert rig.box.fates_when_stored == [None]
    assert delivery.fate == ("term", reason)
    assert outcome.result == "dead_lettered"
    assert outcome.detail.startswith(f"{reason}: {type(error).__name__}")


@pytest.mark.parametrize("data", [b"", b"\xff", b"{", b"[]", b"{}", b'{"message":3}'])
def test_bytes_that_are_no_message_are_given_up_on_at_once(data):
    rig = Rig(must_not_run)
    delivery = FakeDelivery(data)
    outcome = rig.processor.process(delivery)

    assert [reason for _, reason, _ in rig.box.stored] == ["malformed"]
    assert delivery.fate == ("term", "malformed")
    assert outcome.event_id == "test-events-stream:7"
    assert outcome.topic == "order.created"
    assert rig.events == []


def test_a_message_that_does_not_fit_the_handler_is_given_up_on_at_once():
    def handler(message: Order):
        raise AssertionError("the handler ran")

    rig = Rig(handler)
    delivery = FakeDelivery(envelope({"id": "seven"}))
    rig.processor.process(delivery)

    ((_, reason, error),) = rig.box.stored
    assert reason == "schema"
    assert "$.id" in str(error)
    assert delivery.fate == ("term", "schema")
    assert rig.signal_names == ["message-dead-lettered"]


def test_an_error_while_the_app_context_ends_counts_as_the_handlers():
    rig = Rig(quiet)
    rig.teardown_error = RuntimeError("the connection is gone")
    delivery = FakeDelivery()

    assert rig.processor.process(delivery).result == "retried"
    assert delivery.fate[0] == "nak"


@pytest.mark.parametrize("error", [PublishError("full"), RuntimeError("unforeseen")])
def test_a_message_whose_dead_letter_cannot_be_stored_is_kept(error):
    rig = Rig(failing(DeadLetter("no")))
    rig.box.error = error
    delivery = FakeDelivery()
    outcome = rig.processor.process(delivery)

    assert outcome.result == "retried"
    assert "could not be stored" in outcome.detail
    assert delivery.fate[0] == "nak"
    assert delivery.fate[1] >= 1.0
    assert "message-dead-lettered" not in rig.signal_names


def test_without_dead_letters_a_message_is_just_terminated():
    rig = Rig(failing(DeadLetter("no")), dead_letter=False)
    delivery = FakeDelivery()
    rig.processor.process(delivery)

    assert rig.box.stored == []
    assert delivery.fate == ("term", "rejected")


def test_signals_tell_what_happened():
    rig = Rig(quiet)
    rig.processor.process(FakeDelivery())
    assert rig.signal_names == ["message-received", "message-handled"]
    assert rig.signals[1][1]["context"].event_id == "e1"
    assert rig.signals[1][1]["seconds"] >= 0

    error = ValueError("broken")
    rig = Rig(failing(error))
    rig.processor.process(FakeDelivery())
    assert rig.signal_names == ["message-received", "message-retried"]
    assert rig.signals[1][1]["error"] is error
    assert rig.signals[1][1]["context"].attempt == 1
    assert 0.8 <= rig.signals[1][1]["delay"] <= 1.2

    rig = Rig(failing(error))
    rig.processor.process(FakeDelivery(attempt=5))
    assert rig.signal_names == ["message-received", "message-dead-lettered"]
    assert rig.signals[1][1]["reason"] == "handler_error"

    rig = Rig(quiet)
    rig.processor.process(FakeDelivery(b"?"))
    assert [(name, args["context"]) for name, args in rig.signals] == [
        ("message-dead-lettered", None)
    ]


# --- the time limit


def test_a_handler_that_ends_after_its_time_limit_settles_nothing():
    delivery = FakeDelivery()

    def handler(message):
        assert rig.processor.take_over(delivery)

    rig = Rig(handler)
    outcome = rig.processor.process(delivery)

    assert outcome.result == "timed_out"
    assert delivery.fate is None
    assert "message-handled" not in rig.signal_names


def test_a_handler_that_fails_after_its_time_limit_settles_nothing():
    delivery = FakeDelivery(attempt=5)

    def handler(message):
        assert rig.processor.take_over(delivery)
        raise ValueError("too late")

    rig = Rig(handler)
    assert rig.processor.process(delivery).result == "timed_out"
    assert delivery.fate is None
    assert rig.box.stored == []


def test_the_time_limit_comes_too_late_for_a_handler_that_has_ended():
    delivery = FakeDelivery(attempt=5)
    taken = []

    class Slow:
        """Stores, and the time limit runs out meanwhile."""

        def store(self, *args):
            taken.append(rig.processor.take_over(delivery))

    rig = Rig(failing(ValueError("broken")))
    rig.processor._dead_letters = Slow()
    rig.processor.process(delivery)
    taken.append(rig.processor.take_over(delivery))

    assert taken == [False, False]
    assert delivery.fate == ("term", "handler_error")


def test_a_message_out_of_time_is_delivered_again_after_the_backoff():
    rig = Rig(quiet, timeout=3)
    delivery = FakeDelivery(attempt=2)
    assert rig.processor.take_over(delivery)
    rig.processor.time_out(delivery)

    assert delivery.fate[0] == "nak"
    assert 8 <= delivery.fate[1] <= 12
    ((name, arguments),) = rig.signals
    assert name == "message-retried"
    assert isinstance(arguments["error"], HandlerTimeout)
    assert arguments["context"].event_id == "e1"


def test_a_message_out_of_time_at_its_last_delivery_is_a_dead_letter():
    rig = Rig(quiet, timeout=3)
    delivery = FakeDelivery(attempt=5)
    assert rig.processor.take_over(delivery)
    rig.processor.time_out(delivery)

    ((_, reason, error),) = rig.box.stored
    assert reason == "handler_error"
    assert "longer than 3 s" in str(error)
    assert delivery.fate == ("term", "handler_error")


def test_a_delivery_handed_back_by_somebody_else_counts_as_out_of_time():
    delivery = FakeDelivery()
    rig = Rig(lambda message: delivery.nak())

    assert rig.processor.process(delivery).result == "timed_out"
    assert delivery.fate == ("nak", None)


def test_nothing_is_remembered_of_messages_that_ended():
    rig = Rig(quiet)
    for attempt in (1, 5):
        rig.processor.process(FakeDelivery(attempt=attempt))
        rig.processor.process(FakeDelivery(b"?"))

    assert rig.processor._deciders == {}


# --- over the limit


def test_a_message_over_its_limit_is_marked_while_it_runs_alone():
    rig = Rig(lambda message: rig.events.append(set(rig.box.trials)))
    delivery = FakeDelivery(attempt=6)

    assert rig.processor.is_over_limit(delivery)
    assert rig.processor.process_alone(delivery).result == "handled"
    assert {7} in rig.events
    assert rig.box.trials == set()


def test_a_message_at_its_limit_is_not_over_it():
    assert not Rig(quiet).processor.is_over_limit(FakeDelivery(attempt=5))


def test_a_message_whose_run_alone_was_not_survived_is_a_dead_letter():
    rig = Rig(must_not_run)
    rig.box.trials.add(7)
    delivery = FakeDelivery(attempt=7)
    outcome = rig.processor.process_alone(delivery)

    ((_, reason, error),) = rig.box.stored
    assert reason == "max_deliver_exceeded"
    assert "each time the worker died" in str(error)
    assert delivery.fate == ("term", "max_deliver_exceeded")
    assert outcome.result == "dead_lettered"
    assert rig.box.trials == set()


def test_the_mark_stays_while_the_dead_letter_cannot_be_stored():
    rig = Rig(must_not_run)
    rig.box.trials.add(7)
    rig.box.fail()

    assert rig.processor.process_alone(FakeDelivery(attempt=7)).result == "retried"
    assert rig.box.trials == {7}


def test_a_run_alone_that_was_survived_leaves_no_mark_even_if_it_failed():
    def handler(message):
        rig.box.fail()
        raise ValueError("broken")

    rig = Rig(handler)
    delivery = FakeDelivery(attempt=6)

    assert rig.processor.process_alone(delivery).result == "retried"
    assert rig.box.trials == set()


def test_the_mark_makes_room_for_the_dead_letter_of_a_run_alone_that_failed():
    rig = Rig(failing(ValueError("broken")))
    delivery = FakeDelivery(attempt=6)

    assert rig.processor.process_alone(delivery).result == "dead_lettered"
    assert rig.box.trials_when_stored == set()
    assert delivery.fate == ("term", "max_deliver_exceeded")


def test_a_message_is_not_run_alone_while_it_cannot_be_marked():
    rig = Rig(must_not_run)
    rig.box.fail()
    delivery = FakeDelivery(attempt=6)

    assert rig.processor.process_alone(delivery).result == "retried"
    assert delivery.fate == ("nak", 1.0)


def test_without_dead_letters_a_message_over_its_limit_is_just_run():
    rig = Rig(quiet, dead_letter=False)
    assert rig.processor.process_alone(FakeDelivery(attempt=9)).result == "handled"
    assert rig.box.trials == set()


# --- what the log has of a failure


def deep(message):
    return message["missing"]


def calls_deep(message):
    return deep(message)


@pytest.fixture
def records(caplog):
    """What is logged, from here on."""

    class Keep(logging.Handler):
        def emit(self, record):
            kept.append(record)

    kept, handler = [], Keep()
    caplog.set_level("INFO", "flask_natspubsub.worker")
    logging.getLogger("flask_natspubsub").addHandler(handler)
    yield kept
    logging.getLogger("flask_natspubsub").removeHandler(handler)


@pytest.mark.parametrize(
    ("attempt", "result", "shown"),
    [(1, "retried", True), (2, "retried", False), (3, "dead_lettered", True)],
)
def test_a_failure_shows_its_traceback_the_first_time_and_the_last(records, attempt, result, shown):
    rig = Rig(calls_deep, max_deliver=3)

    outcome = rig.processor.process(FakeDelivery(attempt=attempt))

    (record,) = records
    assert outcome.result == record.result == result
    assert isinstance(outcome.error, KeyError)
    assert outcome.subscriber == record.subscriber == "mailer"
    line = deep.__code__.co_firstlineno + 1
    assert (f"test_processor.py:{line})" in record.getMessage()) is not shown
    assert record.levelname == ("ERROR" if shown else "WARNING")
    assert bool(record.exc_info) is shown
    if shown:
        lines = record.exc_text.splitlines()
        assert lines[0] == "  Traceback (most recent call last):"
        assert "in calls_deep" in lines[1], "the first frame is the application's"
        assert lines[-1] == "  KeyError: 'missing'"


@pytest.mark.parametrize("error", [Retry(delay=1), Discard("no"), DeadLetter("never")])
def test_what_a_handler_says_on_purpose_has_no_traceback(records, error):
    Rig(failing(error)).processor.process(FakeDelivery())

    assert [record.exc_info for record in records] == [None]
    assert "test_processor.py" not in records[0].getMessage()


def test_what_this_package_raises_has_no_traceback(records):
    Rig(quiet).processor.process(FakeDelivery(data=b"no json"))

    assert [(record.levelname, record.exc_info) for record in records] == [("ERROR", None)]


def test_a_traceback_writes_no_line_of_its_own_into_the_log(records):
    def fail(message):
        raise ValueError("\x1b[2J\n2026-01-01 INFO forged")

    Rig(fail).processor.process(FakeDelivery())

    text = records[0].exc_text
    assert "\x1b" not in text
    assert all(line.startswith("  ") for line in text.splitlines())


def test_the_line_of_a_message_is_there_before_it_is_acknowledged(caplog):
    caplog.set_level("INFO", "flask_natspubsub.worker")
    seen = []

    class Watched(FakeDelivery):
        def ack(self):
            seen.extend(caplog.messages)
            super().ack()

    Rig(quiet).processor.process(Watched())

    assert len(seen) == 1
    assert seen[0].endswith("ms handled")


def test_the_traceback_of_an_async_handler_begins_with_it(records):
    async def fail(message):
        await asyncio.sleep(0)
        return deep(message)

    rig, handlers = Rig(fail), AsyncHandlers()
    rig.processor._run_async = handlers.run
    try:
        rig.processor.process(FakeDelivery())
    finally:
        handlers.stop()

    assert "in fail" in records[0].exc_text.splitlines()[1]


def test_a_failure_is_told_also_where_the_working_directory_is_gone(records, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    outcome = Rig(calls_deep).processor.process(FakeDelivery(attempt=2))

    assert outcome.detail.endswith(f"({__file__}:{deep.__code__.co_firstlineno + 1})")


def test_nothing_of_a_failed_handler_is_kept_alive():
    class Large:
        pass

    seen = []

    def fail(message):
        large = Large()
        seen.append(weakref.ref(large))
        raise ValueError(str(large))

    rig = Rig(fail)
    gc.collect()
    gc.disable()
    try:
        rig.signals.clear()
        outcome = rig.processor.process(FakeDelivery(attempt=2))
        rig.signals.clear()
        del outcome
        assert seen[0]() is None
    finally:
        gc.enable()


# --- what does not count against a message


class Inboxes:
    """Begins work, unless an error is set."""

    def __init__(self):
        self.error = self.commit_error = None

    def begin(self, *key, **options):
        if self.error is not None:
            raise self.error
        return self

    def commit(self):
        if self.commit_error is not None:
            raise self.commit_error
        return True


def with_inbox(handler, **options):
    rig, inboxes = Rig(handler, **options), Inboxes()
    rig.processor._transactions = inboxes
    return rig, inboxes


def results(rig, attempts):
    return [rig.processor.process(FakeDelivery(attempt=attempt)).result for attempt in attempts]


def test_a_database_that_cannot_be_asked_does_not_count():
    rig, inboxes = with_inbox(failing(ValueError("no")), max_deliver=3)
    inboxes.error = DatabaseError("down")
    assert results(rig, range(1, 21)) == ["retried"] * 20
    inboxes.error = None
    assert not rig.processor.is_over_limit(FakeDelivery(attempt=21))
    assert "dead_lettered" in results(rig, range(21, 24))


def test_a_database_that_is_lost_in_the_handler_counts_in_the_end():
    rig, inboxes = with_inbox(quiet, max_deliver=3)
    inboxes.commit_error = DatabaseError("lost at the commit")
    assert results(rig, range(1, 7)) == ["retried"] * 5 + ["dead_lettered"]


def test_a_busy_inbox_is_asked_less_and_less_often():
    rig, inboxes = with_inbox(quiet, max_deliver=2, backoff=[0.1])
    inboxes.error = InboxBusy("locked")
    delays = []
    for attempt in range(1, 9):
        delivery = FakeDelivery(attempt=attempt)
        rig.processor.process(delivery)
        delays.append(delivery.fate[1])
    assert delays == sorted(delays)
    assert (delays[0], delays[-1]) == (1.0, 10.0)


def test_a_handler_that_was_interrupted_for_another_does_not_count():
    def handler(message):
        raise HandlerInterrupted("another blocked the loop")

    rig = Rig(handler, max_deliver=1)
    assert results(rig, range(1, 9)) == ["retried"] * 8


def test_the_clock_of_the_handler_stands_while_the_inbox_waits():
    seen = []

    def handler(message):
        seen.append(rig.processor.has_begun(delivery))

    rig, _ = with_inbox(handler, max_deliver=1, timeout=3)
    delivery = FakeDelivery()

    class Waiting(Inboxes):
        def begin(self, *key, **options):
            seen.append(rig.processor.has_begun(delivery))
            return super().begin(*key, **options)

    rig.processor._transactions = Waiting()
    rig.processor.process(delivery)
    assert seen == [False, True]

    waited = FakeDelivery(attempt=1)
    rig.processor.time_out(waited, begun=False)
    assert waited.fate[0] == "nak"
    assert rig.box.stored == []
