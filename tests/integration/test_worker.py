"""The worker on a real server: from a message in the stream to what became of it."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import threading
import time
from collections import Counter

import pytest

from flask_natspubsub import DeadLetter, Discard, Retry, TopologyError

from .shop import fail_until

pytestmark = pytest.mark.real_server


# --- one message


def test_messages_are_handled_once_and_acked(shop):
    seen = shop.record("order.created")
    shop.work()
    shop.publish("order.created", *range(50))

    seen.wait(50)
    shop.wait_until_settled()
    assert sorted(seen.numbers) == list(range(50))
    assert {context.attempt for context in seen.contexts} == {1}
    assert shop.dead_letters == []


def test_what_was_published_before_the_first_worker_is_handled_too(shop):
    seen = shop.record("order.created")
    shop.publish("order.created", 1, 2)
    shop.work()
    seen.wait(2)


def test_a_subscriber_for_new_messages_gets_no_old_ones(shop):
    seen = shop.record("order.created", deliver_policy="new")
    shop.publish("order.created", 1)
    shop.work()
    shop.publish("order.created", 2)
    seen.wait(1)
    shop.wait_until_settled()
    assert seen.numbers == [2]


def test_a_failed_message_comes_again_after_each_wait_of_the_backoff(shop):
    times = []

    def then(message, context):
        times.append(time.monotonic())
        fail_until(4)(message, context)

    seen = shop.record("order.created", then=then, backoff=[0.1, 0.5])
    shop.work()
    shop.publish("order.created", 1)

    seen.wait(4)
    shop.wait_until_settled()
    assert [context.attempt for context in seen.contexts] == [1, 2, 3, 4]
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    for wait, asked in zip(waits, [0.1, 0.5, 0.5], strict=True):
        assert asked * 0.8 <= wait < asked * 1.2 + 2
    assert shop.dead_letters == []


def test_a_handler_says_when_it_wants_its_message_again(shop):
    times = []

    def then(message, context):
        times.append(time.monotonic())
        if context.attempt == 1:
            raise Retry(0.5)
        if context.attempt == 2:
            raise Retry(delay=dt.timedelta(seconds=0.2))

    seen = shop.record("order.created", then=then, backoff=[30])
    shop.work()
    shop.publish("order.created", 1)

    seen.wait(3)
    assert times[1] - times[0] >= 0.5
    assert times[2] - times[1] >= 0.2
    shop.wait_until_settled()


def test_a_discarded_message_is_gone(shop):
    def then(message, context):
        raise Discard("not for us")

    seen = shop.record("order.created", then=then)
    shop.work()
    shop.publish("order.created", 1)

    seen.wait(1)
    shop.wait_until_settled()
    assert shop.dead_letters == []


def test_a_handler_gives_a_message_up_at_once(shop):
    def then(message, context):
        raise DeadLetter("no such customer")

    seen = shop.record("order.created", then=then)
    shop.work()
    receipt = shop.pubsub.publish("order.created", {"n": 1}, trace_id="t1")

    (letter,) = shop.wait_for_dead_letters(1)
    shop.wait_until_settled()
    seen.wait(1)
    assert (letter.subscriber, letter.topic) == ("mailer", "order.created")
    assert (letter.reason, letter.error) == ("rejected", "DeadLetter: no such customer")
    assert (letter.event_id, letter.trace_id) == (receipt.event_id, "t1")
    assert (letter.original_stream, letter.original_sequence) == (receipt.stream, receipt.sequence)


def test_a_message_that_always_fails_ends_as_a_dead_letter(shop):
    seen = shop.record("order.created", then=fail_until(99), max_deliver=3)
    shop.work()
    shop.publish("order.created", 1)

    (letter,) = shop.wait_for_dead_letters(1)
    shop.wait_until_settled()
    assert [context.attempt for context in seen.contexts] == [1, 2, 3]
    assert (letter.reason, letter.deliveries) == ("handler_error", 3)
    assert letter.error == "ValueError: not yet"
    assert json.loads(letter.data)["message"] == {"n": 1}


def test_without_dead_letters_a_failed_message_is_just_dropped(shop):
    seen = shop.record("order.created", then=fail_until(99), max_deliver=2, dead_letter=False)
    shop.work()
    shop.publish("order.created", 1)
    seen.wait(2)
    shop.wait_until_settled()
    assert shop.dead_letters == []


def test_good_messages_flow_while_bad_ones_are_retried(shop):
    def then(message, context):
        if message["n"] % 10 == 0:
            raise ValueError("every tenth")

    seen = shop.record("order.created", then=then, backoff=[0.5], max_deliver=2)
    shop.work(concurrency=4)
    shop.publish("order.created", *range(300))
    letters = shop.wait_for_dead_letters(30)

    shop.wait_until_settled()
    assert Counter(seen.numbers) == Counter(list(range(300)) + list(range(0, 300, 10)))
    assert sorted(json.loads(one.data)["message"]["n"] for one in letters) == list(
        range(0, 300, 10)
    )


# --- which messages


def test_wildcards_choose_by_token(shop):
    one = shop.record("order.*", name="one")
    rest = shop.record("order.>", name="rest")
    exact = shop.record("order.created", "order.item.added", name="exact")
    shop.work()
    topics = ["order.created", "order.item.added", "order", "payment.order.created"]
    for number, topic in enumerate(topics):
        shop.publish(topic, number)

    shop.wait_until_settled("one", "rest", "exact")
    assert one.numbers == [0]
    assert sorted(rest.numbers) == [0, 1]
    assert sorted(exact.numbers) == [0, 1]


def test_events_of_another_app_and_of_all_apps(make_shop):
    shop, billing = make_shop(), make_shop("billing")
    own = shop.record("invoice.sent", name="own")
    theirs = shop.record("invoice.sent", name="theirs", producer="billing")
    everybodys = shop.record("invoice.sent", name="everybodys", producer="*")
    shop.work()
    shop.publish("invoice.sent", 1)
    billing.publish("invoice.sent", 2)

    shop.wait_until_settled("own", "theirs", "everybodys")
    assert own.numbers == [1]
    assert theirs.numbers == [2]
    assert sorted(everybodys.numbers) == [1, 2]
    assert [context.producer for context in theirs.contexts] == ["billing"]


def test_a_raw_subject(shop):
    seen = shop.record(subject=f"{shop.settings.env}.events.*.done")
    shop.work()
    shop.publish_by_hand(
        (f".{shop.settings.env}.events.job.done", b'{"message":{"n":1}}', None),
        (f".{shop.settings.env}.events.job.begun", b'{"message":{"n":2}}', None),
    )
    seen.wait(1)
    shop.wait_until_settled()
    assert seen.numbers == [1]
    assert seen.contexts[0].topic == "job.done"


def test_a_subject_that_no_stream_stores_is_refused(shop):
    shop.record(subject="elsewhere.>")
    with pytest.raises(TopologyError, match=r"'elsewhere\.>'"):
        shop.work()


def test_two_subscribers_each_get_every_message(shop):
    one = shop.record("order.created", name="one")
    two = shop.record("order.created", name="two", then=fail_until(2))
    shop.work()
    shop.publish("order.created", *range(20))

    shop.wait_until_settled("one", "two")
    assert sorted(one.numbers) == list(range(20))
    assert Counter(two.numbers) == Counter(list(range(20)) * 2)


def test_a_worker_may_run_some_subscribers_only(shop):
    one = shop.record("order.created", name="one")
    two = shop.record("order.created", name="two")
    worker = shop.work(only=["two"])
    shop.publish("order.created", 1)

    shop.wait_until_settled("two")
    assert worker.subscribers == ["two"]
    assert (one.numbers, two.numbers) == ([], [1])


def test_two_workers_share_the_load(make_shop):
    shops = [make_shop(), make_shop()]
    seen = [
        shop.record("order.created", then=lambda *_: threading.Event().wait(0.005))
        for shop in shops
    ]
    for shop in shops:
        shop.work(concurrency=2)
    shops[0].publish("order.created", *range(300))

    shops[0].wait_until_settled()
    assert Counter(seen[0].numbers + seen[1].numbers) == Counter(range(300))
    assert min(len(one.calls) for one in seen) > 50


# --- written by others


def test_a_message_of_the_javascript_package_reaches_the_handler(shop):
    seen = shop.record("order.created")
    shop.work()
    body = (
        '{"event_id":"0b5e1f6a-2222-4d2e-8a8e-1234567890ab","schema_version":1,'
        '"topic":"order.created","message_type":"OrderCreated","producer":"web",'
        '"occurred_at":"2025-01-02T03:04:05.678Z","trace_id":"trace-abc",'
        '"message":{"n":1,"name":"Zoë","note":null}}'
    ).encode()
    headers = {
        "topic": "order.created",
        "trace_id": "trace-abc",
        "Nats-Msg-Id": "0b5e1f6a-2222-4d2e-8a8e-1234567890ab",
    }
    shop.publish_by_hand(("order.created", body, headers))

    seen.wait(1)
    ((message, context),) = seen.calls
    assert message == {"n": 1, "name": "Zoë", "note": None}
    assert context.event_id == "0b5e1f6a-2222-4d2e-8a8e-1234567890ab"
    assert (context.producer, context.trace_id) == ("web", "trace-abc")
    assert context.occurred_at == dt.datetime(2025, 1, 2, 3, 4, 5, 678000, dt.UTC)
    assert context.raw == body


def test_a_message_of_the_ruby_package_reaches_the_handler(shop):
    seen = shop.record("order.order.created")
    shop.work()
    body = json.dumps(
        {
            "event_id": "11111111-2222-4d2e-8a8e-1234567890ab",
            "schema_version": 1,
            "domain": "order",
            "resource": "order",
            "action": "created",
            "producer": "web",
            "resource_id": 42,
            "occurred_at": "2025-01-02T03:04:05Z",
            "trace_id": "trace-abc",
            "payload": {"n": 42},
        }
    ).encode()
    shop.publish_by_hand(
        ("order.order.created", body, {"nats-msg-id": "11111111-2222-4d2e-8a8e-1234567890ab"})
    )

    seen.wait(1)
    ((message, context),) = seen.calls
    assert message == {"n": 42}
    assert context.topic == "order.order.created"
    assert context.event_id == "11111111-2222-4d2e-8a8e-1234567890ab"
    assert context.envelope["resource_id"] == 42
    assert context.occurred_at == dt.datetime(2025, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


def test_a_message_without_any_id_is_known_by_its_place(shop):
    seen = shop.record("order.created")
    shop.work()
    shop.publish_by_hand(("order.created", b'{"message":{"n":1}}', None))
    seen.wait(1)
    (context,) = seen.contexts
    assert context.event_id == f"{context.stream}:{context.sequence}"
    assert context.topic == "order.created"
