"""Dead letters from the first failure to the replay that succeeds, on a real server."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.support.waiting import eventually

pytestmark = pytest.mark.real_server


class Mended:
    """A handler that fails until it is mended."""

    def __init__(self, shop, name, **options):
        self.broken = True
        self.seen = shop.record("order.created", name=name, then=self._then, **options)

    def _then(self, message, context):
        if self.broken:
            raise ValueError(f"{context.subscriber} is broken")


@pytest.fixture
def two(make_shop):
    """A shop with two subscribers of one topic that have given up on a message each."""
    shop = make_shop()
    mailer = Mended(shop, "mailer", max_deliver=2)
    audit = Mended(shop, "audit", max_deliver=1)
    shop.work()
    shop.pubsub.publish("order.created", {"n": 1}, event_id="e1", trace_id="t1")
    shop.wait_for_dead_letters(2)
    shop.wait_until_settled("mailer", "audit")
    return shop, mailer, audit


def test_dead_letters_are_listed_and_shown(two):
    shop, _, _ = two
    letters = {letter.subscriber: letter for letter in shop.dead_letters}

    assert set(letters) == {"mailer", "audit"}
    for name, deliveries in (("mailer", 2), ("audit", 1)):
        letter = letters[name]
        assert (letter.topic, letter.event_id, letter.trace_id) == ("order.created", "e1", "t1")
        assert (letter.reason, letter.deliveries) == ("handler_error", deliveries)
        assert letter.error == f"ValueError: {name} is broken"
        assert json.loads(letter.data)["message"] == {"n": 1}
        assert shop.pubsub.dead_letters.get(letter.id) == letter
    assert [one.subscriber for one in shop.pubsub.dead_letters.list(subscriber="audit")] == [
        "audit"
    ]


def test_a_replay_reaches_the_failed_subscriber_only(two):
    shop, mailer, audit = two
    mailer.broken = audit.broken = False
    (letter,) = shop.pubsub.dead_letters.list(subscriber="mailer")
    shop.pubsub.dead_letters.replay(letter)

    mailer.seen.wait(3)
    shop.wait_until_settled("mailer", "audit")
    assert len(audit.seen.calls) == 1
    context = mailer.seen.contexts[-1]
    assert (context.event_id, context.trace_id, context.attempt) == ("e1", "t1", 1)
    assert context.topic == "order.created"
    assert context.subject == letter.original_subject
    assert [one.subscriber for one in shop.dead_letters] == ["audit"]


def test_both_subscribers_get_their_own_replay(two):
    """They have the same event id, by which the server must not take one for a copy."""
    shop, mailer, audit = two
    mailer.broken = audit.broken = False
    for letter in shop.dead_letters:
        assert not shop.pubsub.dead_letters.replay(letter).duplicate

    mailer.seen.wait(3)
    audit.seen.wait(2)
    shop.wait_until_settled("mailer", "audit")
    assert shop.dead_letters == []


def test_replaying_the_same_dead_letter_twice_handles_it_once(two):
    shop, mailer, _ = two
    mailer.broken = False
    (letter,) = shop.pubsub.dead_letters.list(subscriber="mailer")
    assert not shop.pubsub.dead_letters.replay(letter).duplicate
    assert shop.pubsub.dead_letters.replay(letter).duplicate

    mailer.seen.wait(3)
    shop.wait_until_settled("mailer")
    mailer.seen.wait(3)


def test_a_replay_that_fails_is_a_new_dead_letter_with_its_own_count(two):
    shop, mailer, _ = two
    (first,) = shop.pubsub.dead_letters.list(subscriber="mailer")
    ack = shop.pubsub.dead_letters.replay(first)

    (second,) = eventually(lambda: list(shop.pubsub.dead_letters.list(subscriber="mailer")))
    assert [context.attempt for context in mailer.seen.contexts] == [1, 2, 1, 2]
    assert second.id != first.id
    assert (second.event_id, second.deliveries) == ("e1", 2)
    assert second.original_sequence == ack.sequence
    assert second.headers["x-replay-count"] == "1"
    assert second.data == first.data

    mailer.broken = False
    shop.pubsub.dead_letters.replay(second)
    mailer.seen.wait(5)
    assert mailer.seen.contexts[-1].headers["x-replay-count"] == "2"


def test_a_discarded_dead_letter_is_gone(two):
    shop, mailer, _ = two
    for letter in shop.dead_letters:
        assert shop.pubsub.dead_letters.discard(letter)
    assert shop.dead_letters == []
    assert not shop.pubsub.dead_letters.discard(letter)
    assert len(mailer.seen.calls) == 2


def test_many_are_replayed(make_shop):
    shop = make_shop()
    mailer = Mended(shop, "mailer", max_deliver=1)
    shop.work()
    shop.publish("order.created", *range(100))
    letters = shop.wait_for_dead_letters(100)
    mailer.broken = False
    for letter in letters:
        shop.pubsub.dead_letters.replay(letter)

    mailer.seen.wait(200)
    shop.wait_until_settled()
    assert Counter(mailer.seen.numbers) == Counter(list(range(100)) * 2)
    assert shop.dead_letters == []


def test_a_malformed_message_stays_malformed_however_often_it_is_replayed(shop):
    shop.record("order.created")
    shop.work()
    shop.publish_by_hand(("order.created", b"\x00{", None))
    for _ in range(3):
        (letter,) = shop.wait_for_dead_letters(1)
        assert (letter.reason, letter.data) == ("malformed", b"\x00{")
        shop.pubsub.dead_letters.replay(letter)
        eventually(lambda id=letter.id: [x for x in shop.dead_letters if x.id != id])


def test_a_body_that_leaves_no_room_for_the_headers_is_found_in_the_original_stream(shop):
    mailer = Mended(shop, "mailer", max_deliver=1)
    shop.work()
    room = shop.state.broker().max_payload - 600
    shop.pubsub.publish("order.created", {"n": 1, "text": "x" * room})
    (letter,) = shop.wait_for_dead_letters(1)

    assert letter.body_omitted
    assert letter.data == b""
    body = shop.pubsub.dead_letters.body(letter)
    assert len(json.loads(body)["message"]["text"]) == room
    mailer.broken = False
    shop.pubsub.dead_letters.replay(letter)
    mailer.seen.wait(2)
    assert mailer.seen.messages[1] == mailer.seen.messages[0]


def test_a_dead_letter_of_the_javascript_package_is_replayed_to_whoever_subscribes(shop):
    seen = shop.record("order.created")
    shop.work()
    original = {"event_id": "e1", "topic": "order.created", "message": {"n": 1}}
    letter = {
        "event_id": "e1",
        "original_subject": shop.subject("order.created"),
        "payload": original,
        "reason": "handler_error",
        "error": "TypeError: x",
        "deliveries": 5,
    }
    shop.publish_by_hand(
        ("dlq", json.dumps(letter).encode(), {"x-dead-letter": "true", "x-event-id": "e1"})
    )
    (found,) = shop.wait_for_dead_letters(1)
    assert found.shape == "javascript"
    shop.pubsub.dead_letters.replay(found)
    seen.wait(1)
    assert (seen.numbers, seen.contexts[0].event_id) == ([1], "e1")
    assert shop.dead_letters == []
