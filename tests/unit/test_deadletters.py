"""Dead letters: storing, reading in all three shapes, replaying, discarding."""

from __future__ import annotations

import base64
import json

import pytest

from flask_natspubsub.brokers.base import StreamConfig
from flask_natspubsub.brokers.memory.broker import MemoryBroker
from flask_natspubsub.brokers.memory.clock import VirtualClock
from flask_natspubsub.brokers.topology import wanted_streams
from flask_natspubsub.deadletters.box import DeadLetterBox
from flask_natspubsub.deadletters.reader import DeadLetters
from flask_natspubsub.errors import (
    BrokerError,
    DecodingError,
    PayloadTooLarge,
    PublishError,
    ReplayRefused,
)
from flask_natspubsub.messages.message import Message
from flask_natspubsub.subscribing.registry import Registry

from .worker_helpers import SETTINGS, FakeDelivery, Rig, envelope

MAIN = "test-events-stream"
DEAD = "test-events-stream-dlq"


class Place:
    """A broker in memory with the streams of an app, its dead letters and what reads them."""

    def __init__(self, max_payload=1024 * 1024):
        self.broker = MemoryBroker(VirtualClock(), max_payload=max_payload)
        self.broker.want(wanted_streams(SETTINGS))
        self.box = DeadLetterBox(self.broker, SETTINGS)
        #: The subscribers that the app has now, with what they receive.
        self.declared = {"mailer": ("order.created",), "audit": ("order.*",)}
        self.letters = DeadLetters(self.broker, SETTINGS, self.subscriptions)

    def subscriptions(self):
        registry = Registry()
        for name, topics in self.declared.items():
            registry.add(lambda message: None, *topics, name=name)
        return registry.resolve(SETTINGS)

    def publish(self, subject, data, **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        (result,) = self.broker.submit([Message(subject, data, named)], 1).results
        assert not isinstance(result, Exception), result
        return result.sequence

    def give_up(self, delivery=None, *, name="mailer", reason="handler_error", error=None):
        delivery = delivery or FakeDelivery()
        subscription = _subscription(name)
        self.box.store(delivery, subscription, reason, error or ValueError("broken"))

    def stored(self, stream=DEAD):
        return list(self.broker.messages(stream))

    def only(self, **which):
        (record,) = self.letters.list(**which)
        return record


def _subscription(name):
    registry = Registry()
    registry.add(lambda message: None, "order.created", name=name)
    return registry.resolve(SETTINGS)[0]


@pytest.fixture
def place():
    place = Place()
    yield place
    place.broker.close()


# --- storing


def test_a_dead_letter_is_the_original_with_headers_that_say_why(place):
    headers = {"topic": "order.created", "Nats-Msg-Id": "e1", "x-custom": "kept"}
    data = envelope(trace_id="t1")
    place.give_up(FakeDelivery(data, attempt=4, headers=headers))

    (message,) = place.stored()
    assert message.data == data
    assert message.subject == "test.dlq.shop.mailer"
    headers = dict(message.headers)
    assert headers.pop("x-dead-lettered-at").endswith("Z")
    assert headers == {
        "topic": "order.created",
        "x-custom": "kept",
        "x-dead-letter": "true",
        "x-dlq-reason": "handler_error",
        "x-dlq-error": "ValueError: broken",
        "x-deliveries": "4",
        "x-event-id": "e1",
        "x-trace-id": "t1",
        "x-original-subject": "test.shop.order.created",
        "x-original-stream": MAIN,
        "x-original-sequence": "7",
        "x-subscriber": "mailer",
        "Nats-Msg-Id": f"dlq:shop/mailer:{MAIN}:7:1750000000000",
    }


def test_storing_twice_stores_once(place):
    place.give_up()
    place.give_up(FakeDelivery(attempt=2))
    assert len(place.stored()) == 1


def test_two_subscribers_have_a_dead_letter_each(place):
    place.give_up(name="mailer")
    place.give_up(name="audit")
    assert [record.subscriber for record in place.letters] == ["mailer", "audit"]


def test_bytes_that_are_no_message_are_kept_as_they_are(place):
    data = b"\x00\xff{not json"
    place.give_up(FakeDelivery(data), reason="malformed", error=DecodingError("no"))

    record = place.only()
    assert record.data == data
    assert record.topic == "order.created"
    assert record.event_id == ""
    assert "x-event-id" not in record.headers


def test_headers_that_would_lie_or_make_the_server_act_are_left_out(place):
    hostile = {
        "X-Dead-Letter": "no",
        "x-dlq-context": "{}",
        "x-original-subject": "elsewhere",
        "Nats-Rollup": "all",
        "nats-ttl": "1s",
        "bad name": "x",
        "fine": "yes",
    }
    place.give_up(FakeDelivery(headers=hostile))

    (message,) = place.stored()
    assert message.headers["fine"] == "yes"
    assert message.headers["x-original-subject"] == "test.shop.order.created"
    assert not {"X-Dead-Letter", "x-dlq-context", "Nats-Rollup", "nats-ttl", "bad name"} & set(
        message.headers
    )


def test_a_body_too_large_to_keep_is_found_in_the_original_stream():
    place = Place(max_payload=4000)
    data = envelope({"text": "x" * 3600})
    sequence = place.publish("test.shop.order.created", data, x_custom="kept")
    place.give_up(FakeDelivery(data, headers={"x-custom": "kept"}, sequence=sequence))

    (message,) = place.stored()
    assert message.data == b""
    record = place.only()
    assert record.body_omitted
    assert record.event_id == "e1"
    assert place.letters.body(record) == data

    place.letters.replay(record)
    replayed = place.stored(MAIN)[-1]
    assert replayed.data == data
    assert replayed.headers["x-custom"] == "kept"
    assert replayed.headers["x-replay-for"] == "mailer"


def test_a_body_left_out_whose_original_is_gone_cannot_be_replayed():
    place = Place(max_payload=4000)
    place.give_up(FakeDelivery(envelope({"text": "x" * 3600}), sequence=99))
    record = place.only()

    with pytest.raises(BrokerError, match="no longer in 'test-events-stream'"):
        place.letters.replay(record)
    assert place.only() == record


def test_what_cannot_be_stored_at_all_is_an_error():
    place = Place(max_payload=100)
    with pytest.raises(PayloadTooLarge):
        place.give_up()


def test_a_dead_letter_that_is_not_stored_is_an_error(place):
    place.broker.fail_publishes(1)
    with pytest.raises(PublishError):
        place.give_up()


# --- reading


def test_an_own_dead_letter_is_read_with_all_it_says(place):
    place.give_up(FakeDelivery(envelope(trace_id="t1"), attempt=4))

    record = place.only()
    assert (record.id, record.stream, record.sequence) == ("1", DEAD, 1)
    assert (record.subscriber, record.topic) == ("mailer", "order.created")
    assert (record.reason, record.error) == ("handler_error", "ValueError: broken")
    assert (record.deliveries, record.event_id, record.trace_id) == (4, "e1", "t1")
    assert record.original_subject == "test.shop.order.created"
    assert (record.original_stream, record.original_sequence) == (MAIN, 7)
    assert record.stored_at.timestamp() == pytest.approx(place.broker.now())
    assert record.data == envelope(trace_id="t1")
    assert (record.shape, record.body_omitted) == ("python", False)


def _javascript(original=None, **more):
    """What the JavaScript package writes: an object around the original."""
    original = original or envelope(trace_id="t1")
    values = {
        "event_id": "e1",
        "original_subject": "test.web.order.created",
        "payload": json.loads(original),
        "raw_base64": base64.b64encode(original).decode(),
        "headers": {"topic": ["order.created"]},
        "deliveries": 5,
        "reason": "max_deliver_exceeded",
        "error": "TypeError: x is undefined",
        "occurred_at": "2025-01-02T03:04:05.678Z",
        "trace_id": "t1",
    }
    return json.dumps(values | more).encode()


JAVASCRIPT_HEADERS = {
    "x_dead_letter": "true",
    "x_dlq_reason": "max_deliver_exceeded",
    "x_deliveries": "5",
    "x_event_id": "e1",
}


@pytest.mark.parametrize("headers", [JAVASCRIPT_HEADERS, {}])
@pytest.mark.parametrize(("subject", "whose"), [("test.dlq.web", "web"), ("test.shop.dlq", "shop")])
def test_a_dead_letter_of_the_javascript_package_is_read(place, headers, subject, whose):
    place.publish(subject, _javascript(), **headers)

    record = place.only(app="*", peers=True)
    assert record.app == whose
    assert record.shape == "javascript"
    assert record.data == envelope(trace_id="t1")
    assert (record.event_id, record.trace_id) == ("e1", "t1")
    assert (record.topic, record.original_subject) == ("order.created", "test.web.order.created")
    assert (record.reason, record.error) == ("max_deliver_exceeded", "TypeError: x is undefined")
    assert (record.deliveries, record.subscriber) == (5, "?")
    assert record.dead_lettered_at == "2025-01-02T03:04:05.678Z"


def test_the_payload_of_a_javascript_dead_letter_serves_if_the_bytes_are_missing(place):
    place.publish("test.dlq.shop", _javascript(raw_base64=None))
    assert json.loads(place.only().data)["message"] == {"id": 1}


@pytest.mark.parametrize("raw", ["???", 5, ["e30="]])
def test_a_broken_javascript_dead_letter_is_shown_as_it_is(place, raw):
    data = _javascript(raw_base64=raw)
    place.publish("test.dlq.shop", data)
    record = place.only()
    assert (record.shape, record.data) == ("python", data)


def test_a_dead_letter_of_the_ruby_package_is_read(place):
    context = {
        "event_id": "e1",
        "reason": "max_deliver_exceeded",
        "error_class": "ArgumentError",
        "error_message": "bad value",
        "deliveries": 3,
        "original_subject": "test.web.order.created",
        "sequence": 456,
        "consumer": "web-mailer",
        "stream": "test-events-stream",
        "published_at": "2025-01-02T03:04:05Z",
        "raw_base64": "",
    }
    place.publish(
        "test.dlq.shop",
        envelope(trace_id="t1"),
        x_dead_letter="true",
        x_dlq_reason="max_deliver_exceeded",
        x_deliveries="3",
        x_dlq_context=json.dumps(context),
    )

    record = place.only()
    assert record.shape == "ruby"
    assert record.data == envelope(trace_id="t1")
    assert (record.reason, record.error) == (
        "max_deliver_exceeded",
        "ArgumentError: bad value",
    )
    assert (record.deliveries, record.subscriber) == (3, "web-mailer")
    assert (record.event_id, record.trace_id) == ("e1", "t1")
    assert (record.original_stream, record.original_sequence) == (MAIN, 456)
    assert record.dead_lettered_at == "2025-01-02T03:04:05Z"


@pytest.mark.parametrize("context", ["", "{", "[]", '{"deliveries":"many","sequence":[1]}'])
def test_a_broken_ruby_context_is_no_obstacle(place, context):
    place.publish("test.dlq.shop", b"original", x_dlq_context=context)
    record = place.only()
    assert (record.shape, record.data, record.deliveries) == ("ruby", b"original", 0)


def test_something_foreign_among_the_dead_letters_is_shown(place):
    place.publish("test.dlq.shop", b"\xff", x_deliveries="nine", x_original_sequence="x")
    record = place.only()
    assert (record.subscriber, record.reason, record.deliveries) == ("?", "?", 0)
    assert record.original_sequence is None


def test_an_own_dead_letter_of_a_message_that_looks_like_another_shape(place):
    body = _javascript()
    place.give_up(FakeDelivery(body), reason="malformed")
    assert (place.only().shape, place.only().data) == ("python", body)


# --- finding


@pytest.fixture
def several(place):
    for number, (name, subject) in enumerate(
        [
            ("mailer", "test.shop.order.created"),
            ("audit", "test.shop.order.paid"),
            ("mailer", "test.billing.invoice.sent"),
        ],
        1,
    ):
        data = json.dumps({"event_id": f"e{number}", "message": {}}).encode()
        place.give_up(FakeDelivery(data, subject=subject, sequence=number), name=name)
        place.broker.advance(100)
    return place


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({}, ["e1", "e2", "e3"]),
        ({"subscriber": "mailer"}, ["e1", "e3"]),
        ({"subscriber": "nobody"}, []),
        ({"topic": "order.paid"}, ["e2"]),
        ({"topic": "order.*"}, ["e1", "e2"]),
        ({"topic": "Order.>"}, ["e1", "e2"]),
        ({"topic": "invoice.sent", "subscriber": "mailer"}, ["e3"]),
        ({"older_than": 150}, ["e1", "e2"]),
        ({"newer_than": 150}, ["e3"]),
        ({"newer_than": 250, "older_than": 150}, ["e2"]),
        ({"limit": 2}, ["e1", "e2"]),
        ({"subscriber": "mailer", "limit": 1}, ["e1"]),
        ({"limit": 0}, []),
    ],
)
def test_dead_letters_are_found_by_subscriber_topic_and_age(several, filters, found):
    assert [record.event_id for record in several.letters.list(**filters)] == found


def test_pages_follow_each_other_through_both_streams(several):
    several.publish("test.dlq.billing.old", b"{}")  # in the dead letter stream: the fourth
    several.publish("test.shop.dlq", _javascript())  # among the events
    all_there_are = {"app": "*", "peers": True}
    everything = [record.id for record in several.letters.list(**all_there_are)]
    assert everything == ["1", "2", "3", "4", f"{MAIN}:1"]
    pages, last = [], None
    while page := [
        record.id for record in several.letters.list(limit=2, after=last, **all_there_are)
    ]:
        pages.append(page)
        last = page[-1]
    assert [one for page in pages for one in page] == everything
    assert [len(page) for page in pages] == [2, 2, 1]


def test_page_goes_on_after_a_dead_letter_that_is_gone(several):
    _, second, third = several.letters
    several.letters.discard(second)
    assert [record.id for record in several.letters.list(after=second.id)] == [third.id]
    assert list(several.letters.list(after=third.id)) == []


@pytest.mark.parametrize("wrong", ["", "x", "stream:", "12x", "²"])
def test_page_after_what_is_no_id(several, wrong):
    with pytest.raises(ValueError, match="not the id"):
        list(several.letters.list(after=wrong))


def test_page_asks_for_no_more_than_it_shows(several, monkeypatch):
    read = []
    messages = several.broker.messages

    def counting(*arguments, **options):
        for message in messages(*arguments, **options):
            read.append(message.sequence)
            yield message

    monkeypatch.setattr(several.broker, "messages", counting)
    assert len(list(several.letters.list(limit=2))) == 2
    assert read == [1, 2]


def test_new_ones_are_found_by_halving_and_not_by_reading_the_old_ones(place, monkeypatch):
    for number in range(300):
        place.publish("test.dlq.shop.mailer", b"%d" % number)
        place.broker.advance(1)
    reads = []
    messages = place.broker.messages

    def counting(*arguments, **options):
        for message in messages(*arguments, **options):
            reads.append(message.sequence)
            yield message

    monkeypatch.setattr(place.broker, "messages", counting)
    found = list(place.letters.list(newer_than=5.5))
    assert [record.data for record in found] == [b"295", b"296", b"297", b"298", b"299"]
    assert len(reads) <= 5 + 10
    reads.clear()
    assert len(list(place.letters.list(older_than=295.5))) == 5
    assert len(reads) <= 6


def test_one_is_found_by_its_id(several):
    for record in several.letters:
        assert several.letters.get(record.id) == record
    several.publish("test.shop.dlq", _javascript())
    foreign = list(several.letters.list(peers=True))[-1]
    assert foreign.id == f"{MAIN}:1"
    assert several.letters.get(foreign.id) == foreign


def test_letters_are_those_of_the_app_unless_it_is_told_otherwise(several):
    several.publish("test.dlq.mail.notify", envelope(), x_subscriber="notify")
    assert [record.app for record in several.letters] == ["shop"] * 3
    assert several.letters.get("4") is None
    (mail,) = several.letters.list(app="mail")
    assert (mail.app, mail.subscriber) == ("mail", "notify")
    assert several.letters.get("4", app="mail") == several.letters.get("4", app="*") == mail
    assert [record.app for record in several.letters.list(app="*")] == ["shop"] * 3 + ["mail"]


def test_whose_it_is_says_its_subject_and_not_its_header(several):
    several.publish("test.dlq.shop.mailer", envelope(), x_subscriber="somebody else")
    assert list(several.letters)[-1].subscriber == "mailer"


@pytest.mark.parametrize("subject", ["test.shop.dlq", "test.dlq.shop.mailer.deeper"])
def test_what_lies_elsewhere_is_not_believed(place, subject):
    place.publish(subject, _javascript())
    assert list(place.letters) == []
    assert place.letters.get("1") is None


@pytest.mark.parametrize("record_id", ["99", "", "x", "1:", f"{MAIN}:x", f"{MAIN}:99", "other:1"])
def test_no_dead_letter_has_this_id(several, record_id):
    assert several.letters.get(record_id) is None


def test_an_ordinary_message_is_no_dead_letter(place):
    sequence = place.publish("test.shop.order.created", envelope())
    assert list(place.letters) == []
    assert place.letters.get(f"{MAIN}:{sequence}") is None


# --- trials


def test_marks_of_runs_alone_are_not_listed(place):
    subscription, delivery = Rig(lambda message: None).subscription, FakeDelivery()
    assert not place.box.trial_was_started(delivery, subscription)
    place.box.start_trial(delivery, subscription)

    assert place.box.trial_was_started(delivery, subscription)
    assert not place.box.trial_was_started(FakeDelivery(sequence=8), subscription)
    assert len(place.stored()) == 1
    assert list(place.letters) == []
    assert place.letters.get("1") is None

    place.box.end_trial(delivery, subscription)
    assert not place.box.trial_was_started(delivery, subscription)
    assert place.stored() == []
    place.box.end_trial(delivery, subscription)


# --- sending again


def test_a_replay_goes_to_the_original_subject_for_the_failed_subscriber_only(place):
    data = envelope(trace_id="t1")
    headers = {"topic": "order.created", "trace_id": "t1", "Nats-Msg-Id": "e1", "x-custom": "kept"}
    place.give_up(FakeDelivery(data, headers=headers))
    ack = place.letters.replay(place.only())

    (message,) = place.stored(MAIN)
    assert message.sequence == ack.sequence
    assert message.subject == "test.shop.order.created"
    assert message.data == data
    assert message.headers == {
        "topic": "order.created",
        "trace_id": "t1",
        "x-custom": "kept",
        "Nats-Msg-Id": "e1:replay:1",
        "x-replay-app": "shop",
        "x-replay-for": "mailer",
        "x-replay-count": "1",
        "x-replay-of": f"{DEAD}:1:{int(place.broker.now() * 1000)}",
    }
    assert place.stored() == []


def test_replaying_one_dead_letter_twice_sends_it_once(place):
    place.give_up()
    record = place.only()
    assert not place.letters.replay(record).duplicate
    assert place.letters.replay(record).duplicate
    assert len(place.stored(MAIN)) == 1


def test_the_replays_of_two_subscribers_do_not_take_each_other_for_copies(place):
    place.give_up(name="mailer")
    place.give_up(name="audit")
    for record in list(place.letters):
        assert not place.letters.replay(record).duplicate

    replayed = place.stored(MAIN)
    assert [message.headers["x-replay-for"] for message in replayed] == ["mailer", "audit"]


def test_replays_are_counted(place):
    place.give_up()
    for count in ("1", "2", "3"):
        place.letters.replay(place.only())
        message = place.stored(MAIN)[-1]
        assert message.headers["x-replay-count"] == count
        again = FakeDelivery(message.data, headers=dict(message.headers), sequence=message.sequence)
        place.give_up(again)


@pytest.mark.parametrize("count", ["many", "", "-1", "9" * 30])
def test_a_hostile_count_is_no_obstacle(place, count):
    place.give_up(FakeDelivery(headers={"x-replay-count": count}))
    place.letters.replay(place.only())
    assert place.stored(MAIN)[0].headers["x-replay-count"] == "1"


def test_a_dead_letter_of_nobody_known_is_replayed_to_all(place):
    place.publish("test.shop.dlq", _javascript(original_subject="test.shop.order.created"))
    place.letters.replay(place.only(peers=True))

    (message,) = place.stored(MAIN)
    assert message.data == envelope(trace_id="t1")
    assert "x-replay-for" not in message.headers
    assert list(place.letters.list(peers=True)) == []


def test_one_letter_is_not_taken_for_the_replay_of_another(place):
    """Two letters without an event id and with one number, in two streams: two replays."""
    for subject in ("test.shop.dlq", "test.dlq.shop"):
        broken = base64.b64encode(f"of {subject}".encode()).decode()
        values = {"original_subject": "test.shop.order.created", "event_id": None}
        place.publish(subject, _javascript(raw_base64=broken, **values))
    letters = list(place.letters.list(peers=True))
    assert [record.sequence for record in letters] == [1, 1]
    for record in letters:
        assert not place.letters.replay(record).duplicate
    bodies = {message.data for message in place.stored(MAIN)}
    assert bodies == {b"of test.shop.dlq", b"of test.dlq.shop"}


# --- where a replay may go: SECURITY.md, "Dead letters"

FORGED = [
    "$JS.API.STREAM.DELETE.victim",
    "$JS.API.STREAM.UPDATE.test-events-stream",
    "$SYS.REQ.SERVER.PING",
    "_INBOX.abc.1",
    "natspubsub.wakeup.test.shop",
    "other.shop.order.created",
    "test",
    "test.shop",
    "test.shop.",
    "test.shop..created",
    "test.shop.*",
    "test.shop.>",
    "test.shop.order created",
    "test.shop.order 12 12\r\nPUB injected.by.evil 0\r\n\r\n",
    "test.shop.\x1b[2J",
    "test.dlq.shop.mailer",
    "test.shop.dlq",
    "test.shop.dlq.x",
    "",
]


@pytest.mark.parametrize("subject", FORGED)
@pytest.mark.parametrize("place_of", ["test.dlq.shop.mailer", "test.dlq.shop", "test.shop.dlq"])
def test_a_forged_letter_is_sent_nowhere(place, place_of, subject):
    place.declared["mailer"] = (">",)
    place.publish(place_of, _javascript(original_subject=subject, consumer="mailer"))
    stored = place.stored(MAIN), place.stored()
    record = place.only(peers=True)

    with pytest.raises((ReplayRefused, BrokerError)) as refused:
        place.letters.replay(record)
    assert str(refused.value).isprintable()
    assert (place.stored(MAIN), place.stored()) == stored


@pytest.mark.parametrize("place_of", ["test.dlq.shop.mailer", "test.shop.dlq"])
def test_a_letter_cannot_speak_for_another_app(place, place_of):
    place.broker.want(wanted_streams(SETTINGS, ["test.billing.>"]))
    place.declared["mailer"] = ()
    registry = Registry()
    registry.add(lambda message: None, "invoice.*", name="mailer", producer="billing")
    place.letters = DeadLetters(place.broker, SETTINGS, lambda: registry.resolve(SETTINGS))
    forged = _javascript(original_subject="test.billing.invoice.paid", stream_sequence=1)
    place.publish("test.billing.invoice.paid", envelope({"amount": 1}))
    place.publish(place_of, forged)

    with pytest.raises(ReplayRefused, match="is not the message"):
        place.letters.replay(place.only(peers=True))
    assert place.stored(MAIN)[0].data == envelope({"amount": 1})


def test_the_letter_of_another_apps_event_is_sent_as_it_is_stored_there(place):
    place.broker.want(wanted_streams(SETTINGS, ["test.billing.>"]))
    registry = Registry()
    registry.add(lambda message: None, "invoice.*", name="mailer", producer="billing")
    letters = DeadLetters(place.broker, SETTINGS, lambda: registry.resolve(SETTINGS))
    data = envelope({"amount": 1})
    sequence = place.publish("test.billing.invoice.paid", data, x_custom="kept")
    place.give_up(FakeDelivery(data, subject="test.billing.invoice.paid", sequence=sequence))
    (record,) = letters
    letters.replay(record)

    replayed = place.stored(MAIN)[-1]
    assert (replayed.subject, replayed.data) == ("test.billing.invoice.paid", data)
    assert replayed.headers["x-custom"] == "kept"

    place.give_up(FakeDelivery(data, subject="test.billing.invoice.paid", sequence=sequence))
    place.broker.delete_message(MAIN, sequence)
    place.broker.advance(300)
    place.give_up(FakeDelivery(data, subject="test.billing.invoice.paid", sequence=sequence))
    with pytest.raises(BrokerError, match="no longer in"):
        letters.replay(next(iter(letters)))


def test_a_body_is_fetched_from_the_main_stream_and_of_that_subject_only(place):
    secret = StreamConfig(name="victim", subjects=("victim.>",))
    place.broker.setup([secret])
    place.publish("victim.x", b"secret")
    sequence = place.publish("test.shop.order.paid", envelope({"secret": 1}))
    for stream in ("victim", "victim.x", "a b", MAIN):
        place.publish(
            "test.dlq.shop.mailer",
            b"",
            x_dlq_body_omitted="true",
            x_original_subject="test.shop.order.created",
            x_original_stream=stream,
            x_original_sequence=str(sequence),
        )
    before = place.stored(MAIN)
    for record in place.letters:
        with pytest.raises(BrokerError, match="no longer in"):
            place.letters.body(record)
        with pytest.raises(BrokerError, match="no longer in"):
            place.letters.replay(record)
    assert place.stored(MAIN) == before


def test_a_letter_of_a_renamed_subscriber_is_not_sent_to_nobody(place):
    place.give_up(name="old")
    record = place.only()
    with pytest.raises(ReplayRefused, match=r"no subscriber 'old'.*It has mailer, audit"):
        place.letters.replay(record)
    assert place.only() == record

    place.letters.replay(record, to="mailer")
    (message,) = place.stored(MAIN)
    assert message.headers["x-replay-for"] == "mailer"
    assert list(place.letters) == []


def test_a_letter_is_not_sent_to_a_subscriber_that_would_not_receive_it(place):
    place.give_up()
    place.declared["mailer"] = ("order.paid",)
    with pytest.raises(ReplayRefused, match="does not receive"):
        place.letters.replay(place.only())


def test_the_letter_of_another_app_needs_a_consumer_of_that_app(place):
    place.publish(
        "test.dlq.mail.notify",
        envelope(),
        x_subscriber="notify",
        x_original_subject="test.mail.order.created",
    )
    record = place.only(app="mail")
    with pytest.raises(ReplayRefused, match="'mail' has no subscriber 'notify'"):
        place.letters.replay(record)


# --- sending again, continued


def test_a_dead_letter_that_cannot_be_replayed_stays(place):
    place.give_up()
    record = place.only()
    place.broker.fail_publishes(1)
    with pytest.raises(PublishError):
        place.letters.replay(record)
    assert place.only() == record


def test_discarding_deletes_for_good(place):
    place.give_up()
    record = place.only()
    assert place.letters.discard(record) is True
    assert place.letters.discard(record) is False
    assert list(place.letters) == []
