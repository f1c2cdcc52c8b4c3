"""A broker in memory for tests, on a clock that only moves when it is told to.

Only the broker differs from production: messages are really encoded, stored, delivered,
decoded, retried and dead-lettered, by the same code, in the calling thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import msgspec
from flask import Flask

from ..brokers.base import ConsumerConfig, OutgoingMessage, StoredMessage, StreamConfig
from ..brokers.clock import VirtualClock
from ..brokers.memory import MemoryBroker
from ..brokers.topology import wanted_streams
from ..errors import DecodingError, PublishError
from ..messages.codec import encode_value
from ..messages.headers import Headers
from ..messages.lineage import current_lineage
from ..messages.received import read
from ..messages.subjects import matches, normalize_topic, overlaps, subject_for, topic_of
from ..publishing.draft import Draft, prepare
from ..state import EXTENSION, AppState
from ..subscribing.deadletter_box import DeadLetterBox
from ..subscribing.deadletters import DeadLetterRecord, DeadLetters
from ..subscribing.processor import Outcome, Processor
from ..subscribing.subscription import Subscription
from ..worker.asynchronous import AsyncHandlers

MOST_DELIVERIES = 10_000
#: Stands for the streams of others that a raw subject is looked for in.
ELSEWHERE = "elsewhere"


@dataclass(frozen=True, slots=True)
class Published:
    """A message that the application published.

    :param message: the payload, decoded.
    :param envelope: the whole JSON object around it.
    """

    topic: str
    message: dict[str, Any]
    event_id: str
    trace_id: str | None
    subject: str
    headers: Mapping[str, str]
    envelope: Mapping[str, Any]
    sequence: int


class TestBroker:
    """Takes the place of the application's broker until ``close``; also a context manager.

    :param app: an application with the extension.
    """

    __test__ = False  # its name begins with Test, and pytest would collect it

    def __init__(self, app: Flask) -> None:
        state = app.extensions.get(EXTENSION)
        if not isinstance(state, AppState):
            raise RuntimeError(
                f"The Flask app {app.name!r} has no NatsPubsub extension. "
                "Call init_app in your application factory."
            )
        self._app = app
        self._state = state
        self._clock = VirtualClock()
        self._broker = MemoryBroker(self._clock)
        self._broker.want(wanted_streams(state.settings))
        self._async = AsyncHandlers()
        #: What became of each delivery, in order.
        self.outcomes: list[Outcome] = []
        self._replaced = state.use_broker(self._broker)
        self._prepare()

    def close(self) -> None:
        """Put the application's own broker back."""
        if self._state.persistence is not None:
            self._state.persistence.database.joins_session = False
        if self._replaced is not None:
            self._state.use_broker(self._replaced)
        else:
            self._state.forget_broker()
        self._broker.close()
        self._async.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- what was published

    @property
    def published(self) -> list[Published]:
        """What the application has published, oldest first; rows still in the outbox are last.

        Bytes that are no message (see ``deliver``) are not among them.
        """
        with self._connected():
            stored = list(self._broker.messages(self._state.settings.stream))
        persistence = self._state.persistence
        if persistence is not None:
            rows = persistence.store.pending_messages()
            stored += [
                StoredMessage("", 0, row.subject, row.headers, row.payload, 0) for row in rows
            ]
        return [found for found in map(_published, stored) if found is not None]

    def published_to(self, topic: str) -> list[Published]:
        """Return the published messages of a topic; ``*`` and ``>`` may stand for tokens."""
        pattern = normalize_topic(topic, wildcards=True)
        return [one for one in self.published if matches(pattern, topic_of(one.subject))]

    def assert_published(self, topic: str, /, **subset: Any) -> Published:
        """Check that a message was published to ``topic`` whose payload has these values.

        :returns: the first such message.
        :raises AssertionError: there is none; it lists what was published instead.
        """
        candidates = self.published_to(topic)
        for one in candidates:
            if _has(one.message, subset):
                return one
        raise AssertionError(self._explain(topic, subset, candidates))

    def assert_not_published(self, topic: str, /, **subset: Any) -> None:
        """Check that no message was published to ``topic`` whose payload has these values."""
        for one in self.published_to(topic):
            if _has(one.message, subset):
                raise AssertionError(f"{one.topic} was published: {one.message!r}")

    def _explain(self, topic: str, subset: Mapping[str, Any], candidates: list[Published]) -> str:
        wanted = f"{topic} with {dict(subset)!r}" if subset else topic
        if candidates:
            found = "\n".join(f"  {one.topic}: {one.message!r}" for one in candidates)
            return f"{wanted} was not published; published to this topic:\n{found}"
        others = sorted({one.topic for one in self.published})
        return f"{wanted} was not published; published topics: {', '.join(others) or 'none'}"

    @property
    def dead_letters(self) -> list[DeadLetterRecord]:
        """The messages given up on, oldest first."""
        with self._connected():
            return list(DeadLetters(self._broker, self._state.settings))

    # --- delivering

    def deliver(
        self,
        topic: str,
        message: Any,
        *,
        producer: str | None = None,
        headers: Mapping[str, str] | None = None,
        **envelope: Any,
    ) -> int:
        """Let a message arrive as if somebody else had published it, and ``drain``.

        :param message: a payload; bytes are delivered as they are, envelope and all.
        :param producer: the app that published it; default: this app.
        :param envelope: ``event_id``, ``trace_id``, ``correlation_id``, ``occurred_at``, ...
        :returns: the number of deliveries made.
        """
        settings = msgspec.structs.replace(
            self._state.settings, app_name=producer or self._state.settings.app_name
        )
        if isinstance(message, bytes):
            subject = subject_for(settings.env, settings.app_name, topic)
            outgoing = OutgoingMessage(subject, message, Headers(headers or {}))
        else:
            draft = Draft(topic, message, headers=headers or {}, **envelope)
            outgoing = prepare(draft, settings, current_lineage()).outgoing
        with self._connected():
            self._broker.want(wanted_streams(settings))
            (result,) = self._broker.submit([outgoing], 1.0).results
        if isinstance(result, Exception):
            raise result
        return self.drain()

    def deliver_raw(
        self, subject: str, data: Any, *, headers: Mapping[str, str] | None = None
    ) -> int:
        """Let a message of another system arrive on a NATS subject, and ``drain``.

        :param data: bytes as they are, or what is sent as JSON, without an envelope.
        :returns: the number of deliveries made.
        """
        self._prepare()  # which makes the streams of others that subscribers name
        payload = data if isinstance(data, bytes) else encode_value(data)
        outgoing = OutgoingMessage(subject, payload, Headers(headers or {}))
        with self._connected():
            (result,) = self._broker.submit([outgoing], 1.0).results
        if isinstance(result, Exception):
            raise result
        return self.drain()

    def drain(self) -> int:
        """Run the subscribers until nothing is left to do, moving the clock to each retry.

        Handlers run in this thread, one message at a time, in application contexts of their
        own. What they publish is delivered too.

        :returns: the number of deliveries made; 0 while disconnected.
        :raises AssertionError: it does not end: handlers keep publishing to each other.
        """
        if not self._broker.is_connected:
            return 0
        processors, count = self._prepare(), 0
        while self._broker.is_connected:
            relayed = self._relay()
            round_count = sum(self._step(processor) for processor in processors)
            count += round_count
            if relayed and not round_count:
                continue
            if count > MOST_DELIVERIES:
                raise AssertionError(
                    f"After {count} deliveries there are still more: do handlers publish what "
                    "makes them run again?"
                )
            if not round_count:
                due = self._next_due(processors)
                if due is None:
                    break
                self._broker.advance(max(0.0, due - self._broker.now()) + 1e-6)
        return count

    def _next_due(self, processors: Iterable[Processor]) -> float | None:
        """Return when the next redelivery can happen in any of the streams."""
        streams = {self._consumer(processor.subscription).stream for processor in processors}
        found = [self._broker.next_due(stream) for stream in streams]
        return min((due for due in found if due is not None), default=None)

    def advance(self, seconds: float) -> None:
        """Move the clock, by which retries, delays and acknowledgement deadlines are kept."""
        self._broker.advance(seconds)
        if self._state.persistence is not None:
            self._state.persistence.database.skew += seconds

    def _prepare(self) -> list[Processor]:
        """Make the consumers of all subscribers; a new one sees what is published from here on."""
        self._broker.want(self._state.streams())
        persistence = self._state.persistence_for(self._state.subscriptions())
        if persistence is not None:
            persistence.database.joins_session = True
        box = DeadLetterBox(self._broker, self._state.settings)
        processors = []
        for subscription in self._state.subscriptions():
            self._broker.add_consumer(self._consumer(subscription))
            processors.append(
                Processor(
                    subscription,
                    box,
                    self._context,
                    self._state.emit,
                    self._async.run,
                    persistence.inbox if persistence else None,
                )
            )
        return processors

    @contextmanager
    def _context(self) -> Iterator[None]:
        """Make the context of one message.

        In a test's own transaction it is a savepoint: what a handler has done when it fails must
        not stay, and its rollback must not take what the test has done.
        """
        persistence = self._state.persistence
        isolated = persistence.database.isolated() if persistence else nullcontext()
        with isolated, self._app.app_context():
            yield

    def _consumer(self, subscription: Subscription) -> ConsumerConfig:
        """Return its consumer; the stream of somebody else is made here, where nobody else is."""
        main = self._state.settings.stream
        config = subscription.consumer_config(main)
        stream = self._broker.stream_info(main)
        own = stream.config.subjects if stream else ()
        if any(overlaps(mine, one) for mine in own for one in config.filter_subjects):
            return msgspec.structs.replace(config, stream=main)
        name = subscription.stream or ELSEWHERE
        self._broker.setup([StreamConfig(name=name, subjects=config.filter_subjects)])
        return msgspec.structs.replace(config, stream=name)

    def _relay(self) -> int:
        """Send what is due in the outbox; a publish that a fault makes fail is tried again."""
        if self._state.persistence is None:
            return 0
        try:
            return self._state.make_relay().run_once()
        except PublishError:
            return 1 if self._broker.is_connected else 0

    def _step(self, processor: Processor) -> int:
        """Process one delivery if there is one."""
        config = self._consumer(processor.subscription)
        for delivery in self._broker.fetch(config.stream, config.durable):
            alone = processor.is_over_limit(delivery)
            outcome = (processor.process_alone if alone else processor.process)(delivery)
            self.outcomes.append(outcome)
            return 1
        return 0

    # --- faults

    def fail_publishes(self, count: int = 1) -> None:
        """Let the next ``count`` publishes fail: ``PublishError``, not stored."""
        self._broker.fail_publishes(count)

    def duplicate(self) -> None:
        """Deliver everything that was acknowledged once more at the next ``drain``."""
        self._broker.duplicate()

    def drop_acks(self, count: int = 1) -> None:
        """Lose the next ``count`` acknowledgements: those messages are delivered again."""
        self._broker.drop_acks(count)

    def disconnect(self) -> None:
        """Cut the connection: publishes raise ``NotConnected``, nothing is delivered."""
        self._broker.disconnect()

    def reconnect(self) -> None:
        """Mend the connection."""
        self._broker.reconnect()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Reach the streams, even while the application is cut off from them."""
        cut_off = not self._broker.is_connected
        if cut_off:
            self._broker.reconnect()
        try:
            yield
        finally:
            if cut_off:
                self._broker.disconnect()


def _published(stored: StoredMessage) -> Published | None:
    try:
        received = read(stored.data, stored.headers, stored.subject, stored.stream, stored.sequence)
    except DecodingError:
        return None
    return Published(
        received.topic,
        received.message,
        received.event_id,
        received.trace_id,
        stored.subject,
        stored.headers,
        received.envelope,
        stored.sequence,
    )


def _has(message: Mapping[str, Any], subset: Mapping[str, Any]) -> bool:
    missing = object()
    return all(message.get(key, missing) == value for key, value in subset.items())
