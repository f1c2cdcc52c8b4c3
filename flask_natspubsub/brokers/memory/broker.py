"""A broker inside the process: JetStream's semantics without a server.

For tests and for demos in one process. Streams live as long as the broker and are seen by
nobody else. ``memory_stream`` knows the semantics, ``memory_exchange`` hands messages out;
here are the methods of the port, and the faults that a test can ask for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import product

from ...errors import BrokerError, PayloadTooLarge, PublishError, TopologyError
from ...messages.message import Message, StoredMessage
from ...messages.subjects import overlaps
from .. import topology
from ..base import (
    Broker,
    Change,
    ConsumerConfig,
    ConsumerInfo,
    Delivery,
    StoredAck,
    StreamConfig,
    StreamInfo,
    Ticket,
)
from .clock import Clock, SystemClock, VirtualClock
from .exchange import Exchange, MemoryConsumption, MemoryDelivery, MemoryListener, not_connected
from .stream import MemoryStream, wire_size

#: The server's own default.
DEFAULT_MAX_PAYLOAD = 1024 * 1024


class MemoryBroker(Broker):
    """Streams, consumers and core subjects in the memory of this process.

    Callbacks run one at a time and in order, in whatever thread made a message
    deliverable: one that publishes, requests or settles, or a timer thread for what falls
    due. With a ``VirtualClock`` there is no thread: ``advance`` moves time.

    :param clock: default: the computer's time.
    :param max_payload: bytes of payload and headers a message may have.
    """

    def __init__(
        self, clock: Clock | None = None, *, max_payload: int = DEFAULT_MAX_PAYLOAD
    ) -> None:
        self.clock: Clock = clock or SystemClock()
        self._max_payload = max_payload
        self._exchange = Exchange(self.clock)
        self._lock = self._exchange.lock
        self._is_closed = False
        self._publishes_to_fail = 0

    # --- connection

    @property
    def is_connected(self) -> bool:
        """Whether it is neither closed nor cut off by ``disconnect``."""
        return self._exchange.is_up

    @property
    def max_payload(self) -> int:
        """Bytes of payload and headers a message may have."""
        return self._max_payload

    def connect(self, timeout: float) -> None:
        """Raise NotConnected if closed or cut off; never waits."""
        with self._lock:
            self._exchange.require_connection()

    def close(self, timeout: float = 5.0) -> None:
        """Stop all deliveries and the timer thread; everything is refused from now on."""
        with self._lock:
            self._is_closed = True
            timer = self._exchange.cut_off()
        if timer is not None and timer is not threading.current_thread():
            timer.join(timeout)

    # --- publishing

    def submit(self, messages: Sequence[Message], timeout: float) -> Ticket:
        """Store the messages, in order; the ticket has all results when this returns."""
        ticket = Ticket(len(messages))
        with self._lock:
            for index, message in enumerate(messages):
                ticket.set_result(index, self._publish(message))
        self._exchange.deliver()
        return ticket

    def _publish(self, message: Message) -> StoredAck | PublishError:
        if not self._exchange.is_up:
            return not_connected()
        if self._publishes_to_fail:
            self._publishes_to_fail -= 1
            return PublishError(
                f"No answer to the message to {message.subject}: the test asked for it.",
                outcome="unknown",
            )
        size = wire_size(message.headers, message.data)
        if size > self._max_payload:
            return PayloadTooLarge.of(message.subject, size, self._max_payload)
        return self._exchange.store(message)

    def send(self, subject: str, payload: bytes) -> None:
        """Send to the listeners and, as a server does, to the stream of the subject, if any."""
        with self._lock:
            if self._exchange.is_up and len(payload) <= self._max_payload:
                self._exchange.store(Message(subject, payload, {}))
        self._exchange.deliver()

    # --- consuming

    def consume(
        self, config: ConsumerConfig, deliver: Callable[[Delivery], None]
    ) -> MemoryConsumption:
        """Create or update the durable consumer and start a pull on it."""
        with self._lock:
            config = self._exchange.placed(config)
        pull = MemoryConsumption(self._exchange, config, deliver)
        self._exchange.add_pull(pull)
        return pull

    def listen(self, subject: str, callback: Callable[[Message], None]) -> MemoryListener:
        """Call ``callback`` for every message sent to ``subject``, wildcards included."""
        listener = MemoryListener(self._exchange, subject, callback)
        self._exchange.add_listener(listener)
        return listener

    def add_consumer(self, config: ConsumerConfig) -> None:
        """Create or update a durable consumer without a pull; ``fetch`` takes from it.

        :raises TopologyError: the stream is missing, or does not cover a filter subject.
        """
        with self._lock:
            self._exchange.add_consumer(self._exchange.placed(config))

    def fetch(self, stream: str, durable: str, count: int = 1) -> list[MemoryDelivery]:
        """Take up to ``count`` messages that can be delivered now; never waits.

        :raises TopologyError: there is no such consumer.
        """
        with self._lock:
            consumer = self._exchange.consumer(stream, durable)
            if consumer is None:
                raise TopologyError(
                    f"There is no consumer {durable} on {stream}.", "Call add_consumer first."
                )
            taken = (self._exchange.take(consumer) for _ in range(count))
            return [delivery for delivery in taken if delivery is not None]

    # --- looking after streams

    def want(self, streams: Sequence[StreamConfig]) -> None:
        """Set the streams up at once: nothing here is ever down."""
        self.setup(streams)

    def setup(self, streams: Sequence[StreamConfig], *, dry_run: bool = False) -> list[Change]:
        """Create what is missing; see ``topology.plan`` for the rules."""
        with self._lock:
            self._exchange.require_connection()
            existing = [stream.info() for stream in self._exchange.streams.values()]
            changes = topology.plan(streams, existing)
            if not dry_run:
                for change in changes:
                    self._apply(change)
            return changes

    def _apply(self, change: Change) -> None:
        if change.config is None:
            return
        if change.action == "create":
            self._refuse_overlap(change.config)
            self._exchange.streams[change.stream] = MemoryStream(change.config, self.now())
        elif change.action == "add_subjects":
            self._exchange.streams[change.stream].config = change.config

    def _refuse_overlap(self, config: StreamConfig) -> None:
        """Refuse what a server refuses: two of the wanted streams with a subject in common."""
        for other in self._exchange.streams.values():
            for mine, theirs in product(config.subjects, other.config.subjects):
                if overlaps(mine, theirs):
                    raise BrokerError(
                        f"The stream {config.name!r} cannot have the subject {mine!r}: the "
                        f"stream {other.config.name!r} has {theirs!r}."
                    )

    def _stream(self, name: str) -> MemoryStream | None:
        """Return a stream as it is now, without what is too old; the lock is held."""
        self._exchange.require_connection()
        stream = self._exchange.streams.get(name)
        if stream is not None:
            stream.expire(self.now())
        return stream

    def stream_info(self, stream: str) -> StreamInfo | None:
        """Report on a stream; None if there is none."""
        with self._lock:
            found = self._stream(stream)
            return found.info() if found else None

    def consumer_info(self, stream: str, durable: str) -> ConsumerInfo | None:
        """Report on a consumer; None if there is none."""
        with self._lock:
            found = self._stream(stream)
            consumer = found.consumers.get(durable) if found else None
            return consumer.info(self._exchange.waiting(stream, durable)) if consumer else None

    def place(self, config: ConsumerConfig) -> ConsumerConfig:
        """Return the config with the stream and the name that count; see its ``elsewhere``."""
        with self._lock:
            return self._exchange.placed(config)

    def consumers(self, stream: str) -> list[ConsumerInfo]:
        """Report on all durable consumers of a stream, by name; none if there is no stream."""
        with self._lock:
            found = self._stream(stream)
            known = sorted(found.consumers.items()) if found else []
            return [consumer.info(self._exchange.waiting(stream, name)) for name, consumer in known]

    def delete_consumer(self, stream: str, durable: str) -> bool:
        """Delete a consumer; False if there was none. A pull on it has it made anew."""
        with self._lock:
            self._exchange.require_connection()
            removed = self._exchange.remove_consumer(stream, durable)
        self._exchange.deliver()
        return removed

    def get_message(self, stream: str, sequence: int) -> StoredMessage | None:
        """Read one message; None if it is gone."""
        with self._lock:
            found = self._stream(stream)
            return found.get(sequence) if found else None

    def messages(
        self, stream: str, subject: str = ">", *, after: int = 0
    ) -> Iterator[StoredMessage]:
        """Read messages whose subject matches, oldest first, with a sequence above ``after``."""
        while True:
            with self._lock:
                found = self._stream(stream)
                message = next(found.after(after, (subject,)), None) if found else None
            if message is None:
                return
            yield message
            after = message.sequence

    def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        """Read the newest message of exactly this subject."""
        with self._lock:
            found = self._stream(stream)
            return found.newest((subject,)) if found else None

    def delete_message(self, stream: str, sequence: int) -> bool:
        """Delete one message; False if it was gone."""
        with self._lock:
            found = self._stream(stream)
            return found.remove(sequence) if found else False

    # --- time

    def now(self) -> float:
        """Seconds since the epoch on the broker's clock."""
        return self.clock.now()

    def advance(self, seconds: float) -> None:
        """Move the virtual clock and deliver what is due then.

        :raises TypeError: the broker was not made with a ``VirtualClock``.
        """
        if not isinstance(self.clock, VirtualClock):
            raise TypeError("advance() needs MemoryBroker(VirtualClock()).")
        with self._lock:
            self.clock.advance(seconds)
        self._exchange.deliver()

    def next_due(self, stream: str | None = None) -> float | None:
        """When the next redelivery can happen, on the broker's clock.

        :param stream: look at this stream only; default: at all.
        :returns: ``now()`` if one can happen already; None if no message waits for one.
        """
        with self._lock:
            now = self.now()
            times = [
                consumer.next_due(now)
                for name, found in self._exchange.streams.items()
                if stream in (None, name)
                for consumer in found.consumers.values()
            ]
            return min((time for time in times if time is not None), default=None)

    # --- faults, for tests

    def fail_publishes(self, count: int) -> None:
        """Do not store the next ``count`` messages: ``PublishError``, outcome ``"unknown"``."""
        with self._lock:
            self._publishes_to_fail = count

    def drop_acks(self, count: int) -> None:
        """Lose the next ``count`` acks: their messages come again after ``ack_wait``."""
        with self._lock:
            self._exchange.acks_to_drop = count

    def duplicate(self) -> None:
        """Deliver every acked message that is still stored once more, to who acked it."""
        with self._lock:
            for stream in self._exchange.streams.values():
                stream.expire(self.now())
                for consumer in stream.consumers.values():
                    consumer.repeat_acked(self.now())
        self._exchange.deliver()

    def disconnect(self) -> None:
        """Cut the connection: nothing is stored or delivered, and settlements are lost."""
        with self._lock:
            self._exchange.cut_off()

    def reconnect(self) -> None:
        """Mend what ``disconnect`` cut; a closed broker stays closed."""
        with self._lock:
            self._exchange.is_up = not self._is_closed
        self._exchange.deliver()
