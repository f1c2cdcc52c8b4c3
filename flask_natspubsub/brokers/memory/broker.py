"""A broker in the process's memory, with JetStream's semantics and no server.

It is for tests and for demos in one process. Its streams exist as long as the broker and are not
visible to other processes. ``stream`` implements the semantics and ``exchange`` delivers
messages; this module has the broker's interface, and the faults that a test can cause.
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

    Callbacks run one at a time and in order, in the thread that made a message deliverable: a
    thread that publishes, requests or settles, or a timer thread for messages that become due.
    With a ``VirtualClock`` there is no timer thread: ``advance`` moves the time.

    :param clock: default: the computer's time.
    :param max_payload: maximum bytes of payload and headers of a message.
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
        """Whether the broker is neither closed nor disconnected by ``disconnect``."""
        return self._exchange.is_up

    @property
    def max_payload(self) -> int:
        """The maximum bytes of payload and headers of a message."""
        return self._max_payload

    def connect(self, timeout: float) -> None:
        """Raise ``NotConnected`` if the broker is closed or disconnected; never waits."""
        with self._lock:
            self._exchange.require_connection()

    def close(self, timeout: float = 5.0) -> None:
        """Stop all deliveries and the timer thread; later calls are refused."""
        with self._lock:
            self._is_closed = True
            timer = self._exchange.cut_off()
        if timer is not None and timer is not threading.current_thread():
            timer.join(timeout)

    # --- publishing

    def submit(self, messages: Sequence[Message], timeout: float) -> Ticket:
        """Store the messages in order; the returned ticket already has all results."""
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
        """Send to the listeners and, like a server, to the stream of the subject, if any."""
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
        """Call ``callback`` for every message to ``subject``, which may have wildcards."""
        listener = MemoryListener(self._exchange, subject, callback)
        self._exchange.add_listener(listener)
        return listener

    def add_consumer(self, config: ConsumerConfig) -> None:
        """Create or update a durable consumer without a pull, for ``fetch``.

        :raises TopologyError: the stream is missing, or does not cover a filter subject.
        """
        with self._lock:
            self._exchange.add_consumer(self._exchange.placed(config))

    def fetch(self, stream: str, durable: str, count: int = 1) -> list[MemoryDelivery]:
        """Return up to ``count`` messages that can be delivered now; never waits.

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
        """Set the streams up at once, because this broker is always up."""
        self.setup(streams)

    def setup(self, streams: Sequence[StreamConfig], *, dry_run: bool = False) -> list[Change]:
        """Create missing streams and subjects; see ``topology.plan`` for the rules."""
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
        """Refuse two wanted streams with a common subject, as a server does."""
        for other in self._exchange.streams.values():
            for mine, theirs in product(config.subjects, other.config.subjects):
                if overlaps(mine, theirs):
                    raise BrokerError(
                        f"The stream {config.name!r} cannot have the subject {mine!r}: the "
                        f"stream {other.config.name!r} has {theirs!r}."
                    )

    def _stream(self, name: str) -> MemoryStream | None:
        """Return a stream without expired messages (lock held)."""
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
        """Return the config with the consumer's actual stream and name; see ``elsewhere``."""
        with self._lock:
            return self._exchange.placed(config)

    def consumers(self, stream: str) -> list[ConsumerInfo]:
        """Report on all durable consumers of a stream, by name; none if there is no stream."""
        with self._lock:
            found = self._stream(stream)
            known = sorted(found.consumers.items()) if found else []
            return [consumer.info(self._exchange.waiting(stream, name)) for name, consumer in known]

    def delete_consumer(self, stream: str, durable: str) -> bool:
        """Delete a consumer; False if there was none. A pull on it recreates it."""
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
        """Yield messages whose subject matches, oldest first, with a sequence above ``after``."""
        while True:
            with self._lock:
                found = self._stream(stream)
                message = next(found.after(after, (subject,)), None) if found else None
            if message is None:
                return
            yield message
            after = message.sequence

    def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        """Return the newest message of exactly this subject; None if there is none."""
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
        """Move the virtual clock, and deliver messages that become due.

        :raises TypeError: the broker has no ``VirtualClock``.
        """
        if not isinstance(self.clock, VirtualClock):
            raise TypeError("advance() needs MemoryBroker(VirtualClock()).")
        with self._lock:
            self.clock.advance(seconds)
        self._exchange.deliver()

    def next_due(self, stream: str | None = None) -> float | None:
        """Return the time of the next redelivery on the broker's clock.

        :param stream: consider this stream only; default: all streams.
        :returns: ``now()`` if a message is already due; None if none waits for a redelivery.
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
        """Fail the next ``count`` publishes with a ``PublishError``, outcome ``"unknown"``."""
        with self._lock:
            self._publishes_to_fail = count

    def drop_acks(self, count: int) -> None:
        """Lose the next ``count`` acks; their messages are redelivered after ``ack_wait``."""
        with self._lock:
            self._exchange.acks_to_drop = count

    def duplicate(self) -> None:
        """Redeliver every acked message that is still stored to the consumer that acked it."""
        with self._lock:
            for stream in self._exchange.streams.values():
                stream.expire(self.now())
                for consumer in stream.consumers.values():
                    consumer.repeat_acked(self.now())
        self._exchange.deliver()

    def disconnect(self) -> None:
        """Cut the connection: nothing is stored or delivered, and acks and naks are lost."""
        with self._lock:
            self._exchange.cut_off()

    def reconnect(self) -> None:
        """Restore the connection after ``disconnect``; a closed broker stays closed."""
        with self._lock:
            self._exchange.is_up = not self._is_closed
        self._exchange.deliver()
