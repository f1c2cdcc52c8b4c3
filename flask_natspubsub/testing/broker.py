"""A broker in memory for tests, on a clock that only moves when it is told to.

Only the broker differs from production: messages are really encoded, stored, delivered,
decoded, retried and dead-lettered, by the same code, in the calling thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import msgspec
from flask import Flask

from ..app.state import EXTENSION, AppState
from ..brokers.base import ConsumerConfig, StreamConfig
from ..brokers.memory.broker import MemoryBroker
from ..brokers.memory.clock import VirtualClock
from ..brokers.topology import wanted_streams
from ..deadletters.box import DeadLetterBox
from ..deadletters.reader import DeadLetterRecord, DeadLetters
from ..errors import DecodingError, HandlerVerdict, PublishError
from ..messages.codec import encode_value
from ..messages.headers import Headers
from ..messages.message import Message, StoredMessage
from ..messages.received import read
from ..messages.subjects import matches, normalize_topic, overlaps, subject_for, topic_of
from ..observability.tracing import current_lineage
from ..publishing.draft import Draft
from ..publishing.publisher import prepare
from ..subscribing.subscription import Subscription
from ..worker.async_handlers import AsyncHandlers
from ..worker.outcome import Outcome
from ..worker.processor import Processor

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


class _Seat(NamedTuple):
    """A subscriber, and the stream that its messages come from."""

    stream: str
    processor: Processor


class TestBroker:
    """Takes the place of the application's broker until ``close``; also a context manager.

    :param app: an application with the extension.
    :param others: more of them, which share the broker: what one publishes reaches the
        subscribers of all. ``deliver`` acts for the first.
    """

    __test__ = False  # its name begins with Test, and pytest would collect it

    def __init__(self, app: Flask, *others: Flask) -> None:
        self._states = [_state_of(one) for one in (app, *others)]
        self._state = self._states[0]
        self._clock = VirtualClock()
        self._broker = MemoryBroker(self._clock)
        self._async = AsyncHandlers()
        #: What became of each delivery, in order.
        self.outcomes: list[Outcome] = []
        self._replaced = [state.use_broker(self._broker) for state in self._states]
        self._prepare()

    def close(self) -> None:
        """Put the application's own broker back."""
        for state, replaced in zip(self._states, self._replaced, strict=True):
            if state.persistence is not None:
                state.persistence.database.joins_session = False
            if replaced is not None:
                state.use_broker(replaced)
            else:
                state.forget_broker()
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
            stored = [one for name in self._streams for one in self._broker.messages(name)]
        for state in self._states:
            if state.persistence is not None:
                rows = state.persistence.store.pending_messages()
                stored += [
                    StoredMessage(row.subject, row.data, row.headers, "", 0, 0.0) for row in rows
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
        places = {state.settings.dead_letter_stream: state.settings for state in self._states}
        with self._connected():
            return [one for place in places.values() for one in DeadLetters(self._broker, place)]

    # --- delivering

    def deliver(
        self,
        topic: str,
        message: Any,
        *,
        producer: str | None = None,
        headers: Mapping[str, str] | None = None,
        retries: bool = True,
        raise_errors: bool = False,
        **envelope: Any,
    ) -> int:
        """Let a message arrive as if somebody else had published it, and ``drain``.

        :param message: a payload; bytes are delivered as they are, envelope and all.
        :param producer: the app that published it; default: this app.
        :param retries: see ``drain``, as of ``raise_errors``.
        :param envelope: ``event_id``, ``trace_id``, ``correlation_id``, ``occurred_at``, ...
        :returns: the number of deliveries made.
        """
        settings = msgspec.structs.replace(
            self._state.settings, app_name=producer or self._state.settings.app_name
        )
        if isinstance(message, bytes):
            subject = subject_for(settings.env, settings.app_name, topic)
            outgoing = Message(subject, message, Headers(headers or {}))
        else:
            draft = Draft(topic, message, headers=headers or {}, **envelope)
            outgoing = prepare(draft, settings, current_lineage())
        with self._connected():
            self._broker.want(wanted_streams(settings))
            (result,) = self._broker.submit([outgoing], 1.0).results
        if isinstance(result, Exception):
            raise result
        return self.drain(retries=retries, raise_errors=raise_errors)

    def deliver_raw(
        self,
        subject: str,
        data: Any,
        *,
        headers: Mapping[str, str] | None = None,
        retries: bool = True,
        raise_errors: bool = False,
    ) -> int:
        """Let a message of another system arrive on a NATS subject, and ``drain``.

        :param data: bytes as they are, or what is sent as JSON, without an envelope.
        :param retries: see ``drain``, as of ``raise_errors``.
        :returns: the number of deliveries made.
        """
        self._prepare()  # which makes the streams of others that subscribers name
        payload = data if isinstance(data, bytes) else encode_value(data)
        outgoing = Message(subject, payload, Headers(headers or {}))
        with self._connected():
            (result,) = self._broker.submit([outgoing], 1.0).results
        if isinstance(result, Exception):
            raise result
        return self.drain(retries=retries, raise_errors=raise_errors)

    def drain(self, *, retries: bool = True, raise_errors: bool = False) -> int:
        """Run the subscribers until nothing is left to do, moving the clock to each retry.

        Handlers run in this thread, one message at a time, in application contexts of their
        own. What they publish is delivered too.

        :param retries: False leaves the clock alone: what has failed, or is not due yet, waits.
        :param raise_errors: raise what a handler raises, once its message is settled as it
            would be in production; not ``Retry``, ``Discard`` and ``DeadLetter``, which say
            what is to become of the message.
        :returns: the number of deliveries made; 0 while disconnected.
        :raises AssertionError: it does not end: handlers keep publishing to each other.
        """
        seats, count = self._prepare(), 0
        while True:
            for outcome in self._deliveries(seats):
                count += 1
                if raise_errors:
                    _raise(outcome)
                if count > MOST_DELIVERIES:
                    raise AssertionError(
                        f"After {count} deliveries there are still more: do handlers publish what "
                        "makes them run again?"
                    )
            if not retries or not self._move_to_next_retry(seats):
                return count

    def step(self) -> Outcome | None:
        """Make the next delivery, of those that are due; the clock stays where it is.

        :returns: what became of it, as in ``outcomes``; None if nothing is due.
        """
        return next(self._deliveries(self._prepare()), None)

    def _move_to_next_retry(self, seats: Sequence[_Seat]) -> bool:
        """Move the clock to the next delivery that is due later; False if there is none."""
        if not self._broker.is_connected:
            return False
        due = [self._broker.next_due(stream) for stream in {seat.stream for seat in seats}]
        first = min((time for time in due if time is not None), default=None)
        if first is None:
            return False
        self._broker.advance(max(0.0, first - self._broker.now()) + 1e-6)
        return True

    def advance(self, seconds: float) -> None:
        """Move the clock, by which retries, delays and acknowledgement deadlines are kept."""
        self._broker.advance(seconds)
        for state in self._states:
            if state.persistence is not None:
                state.persistence.database.skew += seconds

    @property
    def _streams(self) -> list[str]:
        """The main streams of the applications: one, if they are of one environment."""
        return list(dict.fromkeys(state.settings.stream for state in self._states))

    def _prepare(self) -> list[_Seat]:
        """Make the consumers of all subscribers; a new one sees what is published from here on.

        :returns: none while disconnected.
        """
        if not self._broker.is_connected:
            return []
        wanted = {stream.name: stream for state in self._states for stream in state.streams()}
        for state in self._states:
            for stream in state.streams():
                subjects = dict.fromkeys((*wanted[stream.name].subjects, *stream.subjects))
                wanted[stream.name] = msgspec.structs.replace(stream, subjects=tuple(subjects))
        self._broker.want(list(wanted.values()))
        return [seat for state in self._states for seat in self._seats(state)]

    def _seats(self, state: AppState) -> Iterator[_Seat]:
        persistence = state.persistence_for(state.subscriptions())
        if persistence is not None:
            persistence.database.joins_session = True
        box = DeadLetterBox(self._broker, state.settings)
        for subscription in state.subscriptions():
            config = self._consumer(state, subscription)
            self._broker.add_consumer(config)
            processor = Processor(
                subscription,
                box,
                partial(_context, state),
                state.emit,
                self._async.run,
                persistence.inbox if persistence else None,
            )
            yield _Seat(config.stream, processor)

    def _consumer(self, state: AppState, subscription: Subscription) -> ConsumerConfig:
        """Return its consumer; the stream of somebody else is made here, where nobody else is."""
        main = state.settings.stream
        config = subscription.consumer_config(main)
        stream = self._broker.stream_info(main)
        own = stream.config.subjects if stream else ()
        if any(overlaps(mine, one) for mine in own for one in config.filter_subjects):
            return msgspec.structs.replace(config, stream=main)
        name = subscription.stream or ELSEWHERE
        self._broker.setup([StreamConfig(name=name, subjects=config.filter_subjects)])
        return msgspec.structs.replace(config, stream=name)

    def _deliveries(self, seats: Sequence[_Seat]) -> Iterator[Outcome]:
        """Relay and deliver what is due, one message for each subscriber in turn."""
        while self._broker.is_connected:
            progress = sum(self._relay(state) for state in self._states)
            for seat in seats:
                outcome = self._process_next(seat)
                if outcome is not None:
                    progress += 1
                    yield outcome
            if not progress:
                return

    def _relay(self, state: AppState) -> int:
        """Send what is due in the outbox; a publish that a fault makes fail is tried again."""
        if state.persistence is None:
            return 0
        try:
            return state.make_relay().run_once()
        except PublishError:
            return 1 if self._broker.is_connected else 0

    def _process_next(self, seat: _Seat) -> Outcome | None:
        """Process one delivery if there is one."""
        processor = seat.processor
        for delivery in self._broker.fetch(seat.stream, processor.subscription.durable):
            alone = processor.is_over_limit(delivery)
            outcome = (processor.process_alone if alone else processor.process)(delivery)
            self.outcomes.append(outcome)
            return outcome
        return None

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


def _state_of(app: Flask) -> AppState:
    state = app.extensions.get(EXTENSION)
    if not isinstance(state, AppState):
        raise RuntimeError(
            f"The Flask app {app.name!r} has no NatsPubsub extension. "
            "Call init_app in your application factory."
        )
    return state


@contextmanager
def _context(state: AppState) -> Iterator[None]:
    """Make the context of one message.

    In a test's own transaction it is a savepoint: what a handler has done when it fails must
    not stay, and its rollback must not take what the test has done.
    """
    persistence = state.persistence
    isolated = persistence.database.isolated() if persistence else nullcontext()
    with isolated, state.app.app_context():
        yield


def _raise(outcome: Outcome) -> None:
    """Raise the error of an outcome, unless it is what a handler says of its message."""
    if outcome.error is not None and not isinstance(outcome.error, HandlerVerdict):
        raise outcome.error


def _published(stored: StoredMessage) -> Published | None:
    try:
        received = read(stored)
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
