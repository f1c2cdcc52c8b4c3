"""Messages given up on: keeping them, reading them, sending them again.

A dead letter is the original message, byte for byte, with headers that say why and where
from; see the wire format. It is stored before the original is terminated, so a message is in
one place or the other whatever dies in between.
"""

from __future__ import annotations

import datetime as dt
import heapq
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from ..brokers.base import Broker, Delivery, OutgoingMessage, StoredAck, StoredMessage
from ..errors import BrokerError, DecodingError, PayloadTooLarge, PublishError
from ..messages.ids import now_timestamp
from ..messages.received import Received, read
from ..messages.subjects import dead_letter_subject, matches, normalize_topic, topic_of
from ..settings import Settings
from .deadletter_shapes import number, values_of
from .retry import GiveUpReason, error_text
from .subscription import Subscription

REPLAY_FOR = "x-replay-for"
REPLAY_COUNT = "x-replay-count"
REPLAY_FORCE = "x-replay-force"
UNKNOWN = "?"
_BODY_OMITTED = "x-dlq-body-omitted"
_TRIAL = "trial"
_OURS = re.compile(r"x-(dead-letter|dlq-|deliveries|event-id|trace-id|original-|subscriber)", re.I)
_HEADER_NAME = re.compile(r"[!-9;-~]+")


def store_one(broker: Broker, message: OutgoingMessage, timeout: float) -> StoredAck:
    """Store one message and wait; the error of the publish if that fails."""
    ticket = broker.submit([message], timeout)
    if not ticket.wait(timeout + 1.0):
        raise PublishError("The broker's thread did not answer.", outcome="unknown")
    result = ticket.results[0]
    if isinstance(result, PublishError):
        raise result
    return cast(StoredAck, result)


class DeadLetterBox:
    """Where a worker puts the messages of one application that it gives up on."""

    def __init__(self, broker: Broker, settings: Settings) -> None:
        self._broker = broker
        self._settings = settings

    def store(
        self,
        delivery: Delivery,
        subscription: Subscription,
        reason: GiveUpReason,
        error: BaseException,
    ) -> None:
        """Store a dead letter; storing the same one twice stores it once.

        A body that is too large together with these headers is left out: it stays in the
        original stream, where ``DeadLetters`` finds it.

        :raises PublishError: it could not be stored.
        """
        own = self._headers(delivery, subscription, reason, error)
        subject = self._subject(subscription)
        message = OutgoingMessage(subject, delivery.data, _kept(delivery.headers) | own)
        try:
            store_one(self._broker, message, self._settings.publish_timeout)
        except PayloadTooLarge:
            message = OutgoingMessage(subject, b"", own | {_BODY_OMITTED: "true"})
            store_one(self._broker, message, self._settings.publish_timeout)

    def _headers(
        self,
        delivery: Delivery,
        subscription: Subscription,
        reason: GiveUpReason,
        error: BaseException,
    ) -> dict[str, str]:
        place = f"{delivery.stream}:{delivery.sequence}"
        received = _try_read(delivery, delivery.subject)
        ids = {
            "x-event-id": received.event_id if received else None,
            "x-trace-id": received.trace_id if received else None,
        }
        return {
            "x-dead-letter": "true",
            "x-dlq-reason": reason,
            "x-dlq-error": error_text(error),
            "x-deliveries": str(delivery.attempt),
            "x-original-subject": delivery.subject,
            "x-original-stream": delivery.stream,
            "x-original-sequence": str(delivery.sequence),
            "x-subscriber": subscription.name,
            "x-dead-lettered-at": now_timestamp(),
            "Nats-Msg-Id": f"dlq:{subscription.name}:{place}",
        } | {name: value for name, value in ids.items() if value}

    def _subject(self, subscription: Subscription) -> str:
        settings = self._settings
        return dead_letter_subject(settings.env, settings.app_name, subscription.token)

    # A message over its delivery limit that no handler refused was in hand whenever the
    # process died: it is the culprit or a bystander. It is run once more alone, and a marker
    # beside the dead letters says so first: if it is found at the next delivery, that run was
    # not survived. The server's count cannot tell, it counts bystanders too.

    def trial_was_started(self, delivery: Delivery, subscription: Subscription) -> bool:
        """Whether this message was already being run alone when a process died."""
        return self._trial_marker(delivery, subscription) is not None

    def start_trial(self, delivery: Delivery, subscription: Subscription) -> None:
        """Note that this message is about to be run alone."""
        subject = self._trial_subject(delivery, subscription)
        store_one(self._broker, OutgoingMessage(subject, b"", {}), self._settings.publish_timeout)

    def end_trial(self, delivery: Delivery, subscription: Subscription) -> None:
        """Forget the marker: the message's fate is settled."""
        marker = self._trial_marker(delivery, subscription)
        if marker is not None:
            self._broker.delete_message(marker.stream, marker.sequence)

    def _trial_subject(self, delivery: Delivery, subscription: Subscription) -> str:
        return f"{self._subject(subscription)}.{_TRIAL}.{delivery.stream}.{delivery.sequence}"

    def _trial_marker(self, delivery: Delivery, subscription: Subscription) -> StoredMessage | None:
        subject = self._trial_subject(delivery, subscription)
        for stream in (self._settings.dead_letter_stream, self._settings.stream):
            found = self._broker.last_message(stream, subject)
            if found is not None:
                return found
        return None


def _kept(headers: Mapping[str, str]) -> dict[str, str]:
    """Keep the original headers but those that make the server do something."""
    return {
        name: value
        for name, value in headers.items()
        if _HEADER_NAME.fullmatch(name)
        and not name.lower().startswith("nats-")
        and not _OURS.match(name)
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterRecord:
    """A dead letter as it is read; times are as written by whoever stored it.

    :param id: names it in ``show``, ``replay`` and ``discard``.
    :param data: the original bytes; empty if ``body_omitted``.
    :param shape: who wrote it: ``"python"``, ``"javascript"`` or ``"ruby"``.
    """

    id: str
    stream: str
    sequence: int
    subscriber: str
    topic: str
    reason: str
    error: str
    deliveries: int
    event_id: str
    trace_id: str | None
    original_subject: str
    original_stream: str
    original_sequence: int | None
    dead_lettered_at: str
    stored_at: dt.datetime
    headers: Mapping[str, str]
    data: bytes
    body_omitted: bool
    shape: str


class DeadLetters:
    """Reads, replays and discards the dead letters of an environment."""

    def __init__(self, broker: Broker, settings: Settings) -> None:
        self._broker = broker
        self._settings = settings

    def __iter__(self) -> Iterator[DeadLetterRecord]:
        return self.list()

    def list(
        self,
        *,
        subscriber: str | None = None,
        topic: str | None = None,
        older_than: float | None = None,
        newer_than: float | None = None,
        limit: int | None = None,
        after: str | None = None,
    ) -> Iterator[DeadLetterRecord]:
        """Read dead letters, oldest first; a page costs the same however many there are.

        :param topic: a topic, in which ``*`` and ``>`` may stand for tokens.
        :param older_than: only what was stored longer ago than these seconds.
        :param newer_than: only what was stored within these last seconds.
        :param after: only what comes after the dead letter with this id, the last of the page
            before; it need not exist any more.
        :raises ValueError: ``after`` is not an id.
        """
        pattern = normalize_topic(topic, wildcards=True) if topic else None
        records = (
            record
            for record in map(self._record, self._read(after, older_than, newer_than))
            if (subscriber is None or record.subscriber == subscriber)
            and (pattern is None or _topic_fits(pattern, record))
        )
        return itertools.islice(records, limit)

    def get(self, record_id: str) -> DeadLetterRecord | None:
        """Read one dead letter; None if there is none with this id."""
        try:
            stream, sequence = self._place(record_id)
        except ValueError:
            return None
        stored = self._broker.get_message(stream, sequence)
        if stored is None or not self._is_dead_letter(stored):
            return None
        return self._record(stored)

    def replay(self, record: DeadLetterRecord, *, force: bool = False) -> StoredAck:
        """Send the message again, to the subscriber that failed only, and remove the dead letter.

        It keeps its event id; other subscribers see that it is not for them and skip it.

        :param force: have it handled even if the inbox says that it was handled before.
        :raises PublishError: it could not be stored; the dead letter stays.
        :raises BrokerError: the body was left out and is no longer in the original stream.
        """
        original = self._original(record)
        headers = _kept(original.headers)
        # The number tells this dead letter from those other subscribers have of the event.
        headers["Nats-Msg-Id"] = f"{record.event_id}:replay:{record.sequence}"
        headers[REPLAY_COUNT] = str(number(headers.get(REPLAY_COUNT)) + 1)
        if record.subscriber != UNKNOWN:
            headers[REPLAY_FOR] = record.subscriber
        headers.pop(REPLAY_FORCE, None)  # of an earlier replay, which has failed
        if force:
            headers[REPLAY_FORCE] = "true"
        message = OutgoingMessage(record.original_subject, original.data, headers)
        ack = store_one(self._broker, message, self._settings.publish_timeout)
        self.discard(record)
        return ack

    def discard(self, record: DeadLetterRecord) -> bool:
        """Delete a dead letter for good; False if it was gone."""
        return self._broker.delete_message(record.stream, record.sequence)

    def body(self, record: DeadLetterRecord) -> bytes:
        """Return the original bytes, from the original stream if they were left out.

        :raises BrokerError: they are no longer there.
        """
        return self._original(record).data

    def _original(self, record: DeadLetterRecord) -> DeadLetterRecord | StoredMessage:
        """Return what has the original body and headers."""
        if not record.body_omitted:
            return record
        original = None
        if record.original_sequence is not None:
            original = self._broker.get_message(record.original_stream, record.original_sequence)
        if original is None:
            raise BrokerError(
                f"The body of dead letter {record.id} was too large to be kept with it, and "
                f"the original is no longer in {record.original_stream!r}.",
            )
        return original

    def _place(self, record_id: str) -> tuple[str, int]:
        """Return the stream and the sequence that an id stands for."""
        stream, _, sequence = checked_id(record_id).rpartition(":")
        return stream or self._settings.dead_letter_stream, int(sequence)

    def _read(
        self, after: str | None, older_than: float | None, newer_than: float | None
    ) -> Iterator[StoredMessage]:
        """Read what is stored, from one stream after the other."""
        settings, now = self._settings, self._broker.now()
        sources = {
            settings.dead_letter_stream: [">"],
            # The peers' packages keep theirs in the main stream.
            settings.stream: [f"{settings.env}.dlq.>", f"{settings.env}.*.dlq"],
        }
        last_stream, last = self._place(after) if after is not None else ("", 0)
        if last_stream == settings.stream:
            del sources[settings.dead_letter_stream]
        for stream, subjects in sources.items():
            start = last if stream == last_stream else 0
            if newer_than is not None:
                start = max(start, self._last_before(stream, now - newer_than))
            for stored in self._merged(stream, subjects, start):
                if older_than is not None and now - stored.timestamp <= older_than:
                    break  # and so is all that follows
                if self._is_dead_letter(stored):
                    yield stored

    def _merged(self, stream: str, subjects: Sequence[str], after: int) -> Iterator[StoredMessage]:
        """Read several subjects of a stream in the order of the stream."""
        found = [self._broker.messages(stream, subject, after=after) for subject in subjects]
        return heapq.merge(*found, key=lambda stored: stored.sequence)

    def _last_before(self, stream: str, time: float) -> int:
        """Return the last sequence stored before ``time``: twenty looks find it in a million."""
        info = self._broker.stream_info(stream)
        if info is None:
            return 0
        low, high = info.first_sequence - 1, info.last_sequence
        while low < high:
            middle = (low + high) // 2
            found = next(iter(self._broker.messages(stream, after=middle)), None)
            if found is None or found.timestamp >= time:
                high = middle
            else:
                low = found.sequence
        return low

    def _is_dead_letter(self, stored: StoredMessage) -> bool:
        tokens = stored.subject.split(".")
        if len(tokens) > 4 and tokens[4] == _TRIAL:
            return False
        env = self._settings.env
        return stored.stream == self._settings.dead_letter_stream or (
            matches(f"{env}.dlq.>", stored.subject) or matches(f"{env}.*.dlq", stored.subject)
        )

    def _record(self, stored: StoredMessage) -> DeadLetterRecord:
        own = stored.stream == self._settings.dead_letter_stream
        record_id = str(stored.sequence) if own else f"{stored.stream}:{stored.sequence}"
        values = values_of(stored)
        original_subject = str(values.get("original_subject") or stored.subject)
        data = values["data"]
        known = _try_read(stored, original_subject, data)
        sequence = str(values.get("original_sequence") or "")
        return DeadLetterRecord(
            id=record_id,
            stream=stored.stream,
            sequence=stored.sequence,
            subscriber=str(values.get("subscriber") or UNKNOWN),
            topic=known.topic if known else topic_of(original_subject),
            reason=str(values.get("reason") or UNKNOWN),
            error=str(values.get("error") or ""),
            deliveries=int(values.get("deliveries") or 0),
            event_id=str(values.get("event_id") or (known.event_id if known else "")),
            trace_id=str(values.get("trace_id") or (known and known.trace_id) or "") or None,
            original_subject=original_subject,
            original_stream=str(values.get("original_stream") or self._settings.stream),
            original_sequence=int(sequence) if sequence.isdigit() else None,
            dead_lettered_at=str(values.get("at") or ""),
            stored_at=dt.datetime.fromtimestamp(stored.timestamp, dt.UTC),
            headers=stored.headers,
            data=data,
            body_omitted=_BODY_OMITTED in stored.headers,
            shape=values["shape"],
        )


def checked_id(record_id: str) -> str:
    """Return the id of a dead letter as it is; ValueError for anything else."""
    sequence = record_id.rpartition(":")[2]
    if not (sequence.isascii() and sequence.isdigit()):
        raise ValueError(f"{record_id!r} is not the id of a dead letter")
    return record_id


def _topic_fits(pattern: str, record: DeadLetterRecord) -> bool:
    return matches(pattern, record.topic) or matches(pattern, topic_of(record.original_subject))


def _try_read(
    source: Delivery | StoredMessage, subject: str, data: bytes | None = None
) -> Received | None:
    body = source.data if data is None else data
    try:
        return read(body, source.headers, subject, source.stream, source.sequence)
    except DecodingError:
        return None
