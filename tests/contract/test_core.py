"""Messages outside any stream, and the connection."""

from __future__ import annotations

from flask_natspubsub.messages.message import Message
from tests.support.waiting import eventually

from .helpers import Place


def test_a_listener_gets_what_is_sent_to_its_subject(empty_place: Place) -> None:
    env, broker = empty_place.env, empty_place.broker
    received: list[Message] = []
    broker.listen(f"wakeup.{env}.*", received.append)

    broker.send(f"wakeup.{env}", b"too short")
    broker.send(f"wakeup.{env}.shop.more", b"too long")
    broker.send(f"wakeup.{env}.shop", b"1")
    broker.send(f"wakeup.{env}.billing", b"")

    eventually(lambda: len(received) >= 2)
    assert [(m.subject, m.data) for m in received] == [
        (f"wakeup.{env}.shop", b"1"),
        (f"wakeup.{env}.billing", b""),
    ]
    assert all(dict(message.headers) == {} for message in received)


def test_every_listener_gets_a_copy_until_it_stops(empty_place: Place) -> None:
    env, broker = empty_place.env, empty_place.broker
    stopped: list[Message] = []
    staying: list[Message] = []
    subscription = broker.listen(f"{env}.>", stopped.append)
    broker.listen(f"{env}.>", staying.append)

    broker.send(f"{env}.a", b"1")
    eventually(lambda: len(stopped) == len(staying) == 1)
    subscription.stop()
    subscription.stop()
    broker.send(f"{env}.a", b"2")
    eventually(lambda: len(staying) == 2)

    assert [message.data for message in stopped] == [b"1"]


def test_a_listener_that_fails_goes_on_listening(empty_place: Place) -> None:
    env, broker = empty_place.env, empty_place.broker
    received: list[bytes] = []

    def fail_once(message: Message) -> None:
        received.append(message.data)
        if len(received) == 1:
            raise ValueError("a bug in the listener")

    broker.listen(f"{env}.a", fail_once)
    broker.send(f"{env}.a", b"1")
    broker.send(f"{env}.a", b"2")

    eventually(lambda: received == [b"1", b"2"])


def test_a_listener_hears_what_a_stream_stores(place: Place) -> None:
    received: list[Message] = []
    place.broker.listen(place.subject(">"), received.append)

    place.submit(Message(place.subject("a"), b"1", {"x-a": "1"}))

    eventually(lambda: received)
    assert received == [Message(place.subject("a"), b"1", {"x-a": "1"})]


def test_what_is_sent_to_the_subject_of_a_stream_is_stored(place: Place) -> None:
    place.broker.send(place.subject("a"), b"1")

    eventually(lambda: place.info().messages == 1)


def test_a_broker_is_connected_until_it_is_closed(empty_place: Place) -> None:
    broker = empty_place.broker
    assert broker.is_connected

    broker.close()
    broker.close()

    assert not broker.is_connected
