"""A stream and its durable consumers as plain state, with JetStream's semantics and no I/O.

Nothing in this module locks, waits or reads a clock: ``MemoryBroker`` holds the lock and passes
the time.
"""

from __future__ import annotations

import datetime as dt
import heapq
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from ...errors import PublishError, TopologyError
from ...messages.headers import Headers
from ...messages.message import Message, StoredMessage
from ...messages.subjects import matches, overlaps
from ..base import ConsumerConfig, ConsumerInfo, StoredAck, StreamConfig, StreamInfo
from ..storing import MESSAGE_ID
from ..topology import owner_metadata, refuse_other_owner
from ..wire import header_block

#: Seconds by which a message may be early, because sums of floats near 2e9 are not exact.
_ROUNDING = 1e-5
#: Bytes that the server's file store adds to each message: record header and checksum.
_RECORD_OVERHEAD = 30


def wire_size(headers: Mapping[str, str], payload: bytes) -> int:
    """Return the bytes of headers and payload, as the server counts them for ``max_payload``."""
    return len(header_block(headers)) + len(payload)


def _record_size(subject: str, headers: Mapping[str, str], payload: bytes) -> int:
    return wire_size(headers, payload) + len(subject) + _RECORD_OVERHEAD


class MemoryStream:
    """Stored messages in order of their sequence, within the limits of the config."""

    def __init__(self, config: StreamConfig, now: float) -> None:
        self.config = config
        self.consumers: dict[str, MemoryConsumer] = {}
        self.first_sequence = 1
        self.last_sequence = 0
        self._created = now
        self._messages: dict[int, StoredMessage] = {}
        self._bytes = 0
        self._ids: dict[str, int] = {}
        self._ids_by_age: deque[tuple[float, str]] = deque()

    def stores(self, subject: str) -> bool:
        """Whether messages to ``subject`` belong in this stream."""
        return any(matches(pattern, subject) for pattern in self.config.subjects)

    def stores_one_of(self, filters: tuple[str, ...]) -> bool:
        """Whether some messages that match ``filters`` belong in this stream."""
        return any(overlaps(own, one) for own in self.config.subjects for one in filters)

    # --- storing

    def publish(self, message: Message, now: float) -> StoredAck | PublishError:
        """Store ``message``, unless its id is known or the stream is full."""
        self.expire(now)
        message_id = message.headers.get(MESSAGE_ID)
        if message_id is not None and message_id in self._ids:
            return StoredAck(self.config.name, self._ids[message_id], duplicate=True)
        size = _record_size(message.subject, message.headers, message.data)
        if self.config.discard == "new" and self._is_over_limit(1, size):
            return PublishError(
                f"The stream {self.config.name} is full, and set to refuse new messages.",
                "Try again later, or raise its limits.",
            )
        self._append(message, size, now)
        if message_id is not None:
            self._ids[message_id] = self.last_sequence
            self._ids_by_age.append((now, message_id))
        ack = StoredAck(self.config.name, self.last_sequence)
        while self._messages and self._is_over_limit(0, 0):
            self.remove(self.first_sequence)
        return ack

    def _is_over_limit(self, more_messages: int, more_bytes: int) -> bool:
        config = self.config
        return (0 < config.max_msgs < len(self._messages) + more_messages) or (
            0 < config.max_bytes < self._bytes + more_bytes
        )

    def _append(self, message: Message, size: int, now: float) -> None:
        self.last_sequence += 1
        self._messages[self.last_sequence] = StoredMessage(
            message.subject,
            message.data,
            Headers(message.headers),
            self.config.name,
            self.last_sequence,
            now,
        )
        self._bytes += size

    def expire(self, now: float) -> None:
        """Remove messages older than ``max_age`` and ids older than the duplicate window."""
        oldest_id = now - self._duplicate_window + _ROUNDING
        while self._ids_by_age and self._ids_by_age[0][0] <= oldest_id:
            del self._ids[self._ids_by_age.popleft()[1]]
        if not self.config.max_age:
            return
        limit = now - self.config.max_age + _ROUNDING
        while self._messages and self._messages[self.first_sequence].timestamp <= limit:
            self.remove(self.first_sequence)

    @property
    def _duplicate_window(self) -> float:
        window = self.config.duplicate_window
        return min(window, self.config.max_age or window)

    def remove(self, sequence: int) -> bool:
        """Delete one message; False if it was gone."""
        message = self._messages.pop(sequence, None)
        if message is None:
            return False
        self._bytes -= _record_size(message.subject, message.headers, message.data)
        for consumer in self.consumers.values():
            consumer.forget(sequence)
        while self.first_sequence <= self.last_sequence and (
            self.first_sequence not in self._messages
        ):
            self.first_sequence += 1
        return True

    # --- reading

    def get(self, sequence: int) -> StoredMessage | None:
        """Return one message; None if it is gone."""
        return self._messages.get(sequence)

    def after(self, sequence: int, subjects: tuple[str, ...] = ()) -> Iterator[StoredMessage]:
        """Yield messages above ``sequence``, oldest first, whose subject matches (or all)."""
        for number in range(max(sequence + 1, self.first_sequence), self.last_sequence + 1):
            message = self._messages.get(number)
            if message is not None and _matches_any(subjects, message.subject):
                yield message

    def newest(self, subjects: tuple[str, ...] = ()) -> StoredMessage | None:
        """Return the newest message whose subject matches (or the newest of all)."""
        for message in reversed(self._messages.values()):
            if _matches_any(subjects, message.subject):
                return message
        return None

    def info(self) -> StreamInfo:
        """Report on the stream."""
        return StreamInfo(
            config=self.config,
            messages=len(self._messages),
            bytes=self._bytes,
            first_sequence=self.first_sequence,
            last_sequence=self.last_sequence,
            created=_timestamp(self._created),
        )

    # --- consumers

    def add_consumer(self, config: ConsumerConfig, now: float) -> MemoryConsumer:
        """Create the durable, or update it in place, in which case it keeps its position.

        :raises TopologyError: the stream does not store one of the filter subjects.
        """
        for subject in config.filter_subjects:
            if not any(overlaps(own, subject) for own in self.config.subjects):
                raise TopologyError(
                    f"The stream {self.config.name} does not store {subject!r}, which the "
                    f"consumer {config.durable} asks for: it would never receive anything.",
                    f"Its subjects are {', '.join(self.config.subjects)}.",
                )
        _refuse_overlapping_filters(config)
        consumer = self.consumers.get(config.durable)
        if consumer is not None:
            refuse_other_owner(config, owner_metadata(consumer.config))
        if consumer is None:
            consumer = self.consumers[config.durable] = MemoryConsumer(self, config, now)
        else:
            consumer.config = msgspec.structs.replace(
                config, deliver_policy=consumer.config.deliver_policy
            )
        return consumer


def _timestamp(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).isoformat(timespec="microseconds")


def _matches_any(subjects: tuple[str, ...], subject: str) -> bool:
    return not subjects or any(matches(pattern, subject) for pattern in subjects)


def _refuse_overlapping_filters(config: ConsumerConfig) -> None:
    subjects = config.filter_subjects
    for index, subject in enumerate(subjects):
        for other in subjects[index + 1 :]:
            if overlaps(subject, other):
                raise TopologyError(
                    f"The consumer {config.durable} asks for {subject!r} and {other!r}, which "
                    "have subjects in common; the server refuses that.",
                    "Keep the wider one.",
                )


@dataclass(slots=True)
class _Pending:
    """A delivered message that is not settled; it is due again at ``since + ack_wait``."""

    since: float
    attempts: int


class MemoryConsumer:
    """The messages that a durable consumer has delivered, and whether they are settled.

    As on the server, an ack or nak names the message, not the delivery, so a late ack also
    settles a later delivery.
    """

    def __init__(self, stream: MemoryStream, config: ConsumerConfig, now: float) -> None:
        self.config = config
        self._stream = stream
        self._cursor = self._first_cursor()
        self._created = now
        self._delivered = 0
        self._active: float | None = None
        self._pending: dict[int, _Pending] = {}
        #: Due for redelivery, in order; a dict, because a message can be in it only once.
        self._redeliver: dict[int, None] = {}
        #: Heap of (since, sequence). An entry is stale if the message has another ``since``.
        self._timers: list[tuple[float, int]] = []
        self._acked: dict[int, int] = {}

    def _first_cursor(self) -> int:
        if self.config.deliver_policy == "all":
            return self.config.start_after
        newest = self._stream.newest(self.config.filter_subjects)
        if self.config.deliver_policy == "last" and newest is not None:
            return newest.sequence - 1
        return self._stream.last_sequence

    @property
    def floor(self) -> int:
        """The sequence up to which everything is settled."""
        return min(self._pending, default=self._cursor + 1) - 1

    def start_after(self, sequence: int) -> None:
        """Deliver nothing up to ``sequence``."""
        self._cursor = sequence

    # --- delivering

    def take(self, now: float) -> tuple[StoredMessage, int] | None:
        """Return the next message and its number of deliveries; None if none is due."""
        self._stream.expire(now)
        self._collect_due(now)
        message = self._next_redelivery() or self._next_new()
        if message is None:
            return None
        pending = self._pending.setdefault(message.sequence, _Pending(now, 0))
        pending.attempts += 1
        self._delivered, self._active = max(self._delivered, message.sequence), now
        self._restart(message.sequence, now)
        return message, pending.attempts

    def _next_redelivery(self) -> StoredMessage | None:
        if not self._redeliver:
            return None
        sequence = next(iter(self._redeliver))
        del self._redeliver[sequence]
        return self._stream.get(sequence)

    def _next_new(self) -> StoredMessage | None:
        if 0 < self.config.max_ack_pending <= len(self._pending):
            return None
        message = next(self._stream.after(self._cursor, self.config.filter_subjects), None)
        self._cursor = self._stream.last_sequence if message is None else message.sequence
        return message

    def _collect_due(self, now: float) -> None:
        while (due := self._next_timer()) is not None and due <= now + _ROUNDING:
            self._redeliver[heapq.heappop(self._timers)[1]] = None

    def _next_timer(self) -> float | None:
        while self._timers:
            since, sequence = self._timers[0]
            pending = self._pending.get(sequence)
            if pending is not None and pending.since == since:
                return since + self.config.ack_wait
            heapq.heappop(self._timers)
        return None

    def _restart(self, sequence: int, since: float) -> None:
        self._pending[sequence].since = since
        heapq.heappush(self._timers, (since, sequence))

    def next_due(self, now: float) -> float | None:
        """Return the time of the next redelivery; ``now`` if a message is already due."""
        self._collect_due(now)
        return now if self._redeliver else self._next_timer()

    # --- settling

    def ack(self, sequence: int) -> None:
        """Settle a message: done."""
        pending = self._pending.get(sequence)
        if pending is not None:
            self.forget(sequence)
            self._acked[sequence] = pending.attempts

    def nak(self, sequence: int, now: float, delay: float | None) -> None:
        """Settle a message: redeliver it, after ``delay`` seconds or at once."""
        if sequence not in self._pending:
            return
        if delay:
            self._restart(sequence, now - self.config.ack_wait + delay)
        else:
            self._redeliver[sequence] = None

    def progress(self, sequence: int, now: float) -> None:
        """Restart ``ack_wait``."""
        self._collect_due(now)
        if sequence in self._pending:
            self._restart(sequence, now)

    def forget(self, sequence: int) -> None:
        """Settle a message that was given up, or that is gone from the stream."""
        self._pending.pop(sequence, None)
        self._redeliver.pop(sequence, None)
        self._acked.pop(sequence, None)

    def repeat_acked(self, now: float) -> None:
        """Make all acknowledged messages due again, as if their acks had been lost."""
        acked, self._acked = self._acked, {}
        for sequence, attempts in acked.items():
            self._pending[sequence] = _Pending(now, attempts)
            self._redeliver[sequence] = None

    def info(self, waiting: int) -> ConsumerInfo:
        """Report on the consumer."""
        new = self._stream.after(self._cursor, self.config.filter_subjects)
        return ConsumerInfo(
            stream=self.config.stream,
            durable=self.config.durable,
            filter_subjects=self.config.filter_subjects,
            delivered=self._delivered,
            ack_floor=self.floor,
            created=_timestamp(self._created),
            last_active=_timestamp(self._active) if self._active is not None else "",
            metadata={**self.config.metadata, **owner_metadata(self.config)},
            pending=sum(1 for _ in new),
            ack_pending=len(self._pending),
            redelivered=sum(1 for pending in self._pending.values() if pending.attempts > 1),
            waiting=waiting,
        )
