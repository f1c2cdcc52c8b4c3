"""What a broker says to a message handed over, and what it then holds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from flask_natspubsub.brokers.base import StoredAck
from flask_natspubsub.brokers.storing import checked, is_known_as, store_one
from flask_natspubsub.errors import (
    BrokerError,
    NoStreamForSubject,
    PayloadTooLarge,
    PublishDenied,
    PublishError,
    RequestDenied,
)
from flask_natspubsub.messages.message import Message
from tests.support.waiting import eventually

from .helpers import Place, size_on_the_wire


def test_a_stored_message_is_acknowledged_with_stream_and_sequence(place: Place) -> None:
    assert place.submit(place.message(b"1")) == [StoredAck(place.stream, 1)]
    assert place.submit(place.message(b"2")) == [StoredAck(place.stream, 2)]


def test_a_batch_is_stored_in_its_order(place: Place) -> None:
    payloads = [str(number).encode() for number in range(300)]

    acks = place.publish(*payloads)

    assert [ack.sequence for ack in acks] == list(range(1, 301))
    assert [message.data for message in place.broker.messages(place.stream)] == payloads


def test_an_empty_batch_is_done_at_once(place: Place) -> None:
    ticket = place.broker.submit([], 1.0)

    assert ticket.done
    assert ticket.wait(0)


def test_threads_can_publish_at_once(place: Place) -> None:
    def publish_some(thread: int) -> list[StoredAck]:
        return [ack for n in range(20) for ack in place.publish(f"{thread}-{n}".encode())]

    with ThreadPoolExecutor(8) as pool:
        acks = [ack for some in pool.map(publish_some, range(8)) for ack in some]

    assert sorted(ack.sequence for ack in acks) == list(range(1, 161))
    stored = {m.sequence: m.data for m in place.broker.messages(place.stream)}
    assert len(set(stored.values())) == 160


def test_a_known_message_id_is_stored_once_and_answered_with_the_first_sequence(
    place: Place,
) -> None:
    place.publish(b"before")

    first, again = place.submit(
        place.message(b"1", Nats_Msg_Id="e1"), place.message(b"1", Nats_Msg_Id="e1")
    )
    (later,) = place.submit(place.message(b"1", topic="order.paid", Nats_Msg_Id="e1"))

    assert first == StoredAck(place.stream, 2)
    assert again == later == StoredAck(place.stream, 2, duplicate=True)
    assert place.info().messages == 2


def test_the_message_id_header_counts_only_as_the_server_spells_it(place: Place) -> None:
    results = [place.submit(Message(place.subject("a"), b"1", {"nats-msg-id": "e1"}))] * 2

    assert place.submit(place.message(b"1", Nats_Msg_Id="e1")) == [StoredAck(place.stream, 2)]
    assert results[0] == [StoredAck(place.stream, 1)]


def test_a_message_id_is_forgotten_after_the_duplicate_window(empty_place: Place) -> None:
    place = empty_place
    place.make_stream(duplicate_window=0.5)

    def publish() -> StoredAck:
        (result,) = place.submit(place.message(b"1", Nats_Msg_Id="e1"))
        assert isinstance(result, StoredAck)
        return result

    assert publish() == StoredAck(place.stream, 1)
    assert publish() == StoredAck(place.stream, 1, duplicate=True)
    eventually(lambda: publish() == StoredAck(place.stream, 2))


def test_the_id_of_a_deleted_message_is_still_known(place: Place) -> None:
    place.submit(place.message(b"1", Nats_Msg_Id="e1"))
    assert place.broker.delete_message(place.stream, 1)

    assert place.submit(place.message(b"1", Nats_Msg_Id="e1")) == [
        StoredAck(place.stream, 1, duplicate=True)
    ]


def test_a_subject_without_a_stream_is_an_error_of_its_own(place: Place) -> None:
    error = place.refused(Message(f"{place.env}.other.order.created", b"{}", {}))

    assert isinstance(error, NoStreamForSubject)
    assert error.outcome == "not_sent"
    assert f"{place.env}.other.order.created" in str(error)


def test_one_bad_message_does_not_stop_its_batch(place: Place) -> None:
    lost = Message(f"{place.env}.other.x", b"{}", {})

    first, error, last = place.submit(place.message(b"1"), lost, place.message(b"2"))

    assert isinstance(error, NoStreamForSubject)
    assert isinstance(first, StoredAck)
    assert isinstance(last, StoredAck)
    assert place.info().messages == 2


def test_the_limit_is_one_mebibyte_unless_the_server_says_otherwise(place: Place) -> None:
    assert place.broker.max_payload == 1024 * 1024


def test_payload_and_headers_together_may_be_as_large_as_the_limit(place: Place) -> None:
    headers = {"topic": "größe", "Nats-Msg-Id": "e1"}
    room = place.broker.max_payload - size_on_the_wire(b"", headers)
    subject = place.subject("large")

    under, exact, over = place.submit(
        Message(subject, b"x" * (room - 1), headers | {"Nats-Msg-Id": "e1"}),
        Message(subject, b"x" * room, headers | {"Nats-Msg-Id": "e2"}),
        Message(subject, b"x" * (room + 1), headers | {"Nats-Msg-Id": "e3"}),
    )

    assert under == StoredAck(place.stream, 1)
    assert exact == StoredAck(place.stream, 2)
    assert isinstance(over, PayloadTooLarge)
    assert over.outcome == "not_sent"
    assert (over.size, over.limit) == (1024 * 1024 + 1, 1024 * 1024)


def test_without_headers_the_payload_alone_counts(place: Place) -> None:
    limit = place.broker.max_payload

    exact, over = place.submit(place.message(b"x" * limit), place.message(b"x" * (limit + 1)))

    assert exact == StoredAck(place.stream, 1)
    assert isinstance(over, PayloadTooLarge)
    place.publish(b"the connection lives on")


def test_a_full_stream_that_refuses_new_messages_is_a_passing_error(empty_place: Place) -> None:
    place = empty_place
    place.make_stream(max_msgs=2, discard="new")
    place.publish(b"1", b"2")

    error = place.refused(place.message(b"3"))

    assert isinstance(error, PublishError)
    assert not isinstance(error, PublishDenied)
    assert error.outcome == "not_sent"
    place.broker.delete_message(place.stream, 1)
    assert place.publish(b"3") == [StoredAck(place.stream, 3)]


def test_a_duplicate_is_no_new_message_for_a_full_stream(empty_place: Place) -> None:
    place = empty_place
    place.make_stream(max_msgs=1, discard="new")
    place.submit(place.message(b"1", Nats_Msg_Id="e1"))

    assert place.submit(place.message(b"1", Nats_Msg_Id="e1")) == [
        StoredAck(place.stream, 1, duplicate=True)
    ]


def test_a_stream_that_discards_old_messages_keeps_the_newest(empty_place: Place) -> None:
    place = empty_place
    place.make_stream(max_msgs=3)

    place.publish(b"1", b"2", b"3", b"4", b"5")

    info = place.info()
    assert (info.messages, info.first_sequence, info.last_sequence) == (3, 3, 5)
    assert [m.data for m in place.broker.messages(place.stream)] == [b"3", b"4", b"5"]


def test_messages_older_than_max_age_are_gone(empty_place: Place) -> None:
    place = empty_place
    place.make_stream(max_age=1.0, duplicate_window=1.0)
    place.publish(b"1", b"2")

    eventually(lambda: place.info().messages == 0)

    assert place.broker.get_message(place.stream, 1) is None
    assert place.publish(b"3") == [StoredAck(place.stream, 3)]


# --- acknowledged is what the stream has, not what it had under the same id


def test_a_message_whose_id_another_subject_took_is_stored_all_the_same(place: Place) -> None:
    place.submit(place.message(b"another", topic="order.paid", Nats_Msg_Id="e1"))
    mine = place.message(b"mine", Nats_Msg_Id="e1")

    ack = store_one(place.broker, mine, 5.0)

    assert not ack.duplicate
    stored = place.broker.get_message(place.stream, ack.sequence)
    assert stored is not None
    assert (stored.subject, stored.data) == (mine.subject, b"mine")
    assert is_known_as(stored.headers, "e1")
    assert not is_known_as(stored.headers, "e")


def test_a_second_copy_stays_one_also_of_such_a_message(place: Place) -> None:
    place.submit(place.message(b"another", topic="order.paid", Nats_Msg_Id="e1"))
    mine = place.message(b"mine", Nats_Msg_Id="e1")
    first = store_one(place.broker, mine, 5.0)

    again = store_one(place.broker, mine, 5.0)

    assert again == StoredAck(place.stream, first.sequence, duplicate=True)
    assert place.info().messages == 2


def test_only_what_is_not_ours_is_stored_again(place: Place) -> None:
    place.submit(place.message(b"another", topic="order.paid", Nats_Msg_Id="e1"))
    place.submit(place.message(b"2", Nats_Msg_Id="e2"))
    batch = [place.message(b"%d" % n, Nats_Msg_Id=f"e{n}") for n in (1, 2, 3)]
    results = place.submit(*batch)
    assert [ack.duplicate for ack in results] == [True, True, False]

    fixed = checked(batch, results, place.broker, 5.0)

    assert [ack.duplicate for ack in fixed] == [False, True, False]
    assert [ack.sequence for ack in fixed[1:]] == [ack.sequence for ack in results[1:]]
    assert place.info().messages == 4


@pytest.mark.parametrize(("error", "looks"), [(RequestDenied, 1), (BrokerError, 2)])
def test_where_messages_cannot_be_read_an_acknowledgement_is_believed(
    place: Place, monkeypatch: pytest.MonkeyPatch, error: type[Exception], looks: int
) -> None:
    """For good if the user may not, and for now if the server is slow."""
    place.submit(place.message(b"another", topic="order.paid", Nats_Msg_Id="e1"))
    asked: list[object] = []

    def denied(places: object, timeout: float) -> None:
        asked.append(places)
        raise error("no")

    monkeypatch.setattr(place.broker, "get_messages", denied)
    for _ in range(2):
        ack = store_one(place.broker, place.message(b"mine", Nats_Msg_Id="e1"), 5.0)
        assert ack.duplicate
    assert len(asked) == looks


def test_what_is_no_subject_is_refused_and_those_behind_it_are_stored(place: Place) -> None:
    hostile = Message("a b\r\nPUB injected 0", b"1", {})

    refused, stored = place.submit(hostile, place.message(b"2"))

    assert isinstance(refused, PublishError)
    assert not refused.temporary
    assert isinstance(stored, StoredAck)
    assert place.info().messages == 1
