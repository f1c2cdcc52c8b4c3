"""A broker in memory for tests, with a clock that moves only on request.

Only the broker differs from production: the same code encodes, stores, delivers, decodes,
retries and dead-letters messages, in the calling thread.
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
from ..deadletters.reader import DeadLetterRecord, DeadLetters
from ..errors import HandlerVerdict, PublishError
from ..messages.codec import encode_value
from ..messages.headers import Headers
from ..messages.message import Message, StoredMessage
from ..messages.received import read_or_none
from ..messages.subjects import matches, normalize_topic, overlaps, subject_for, topic_of
from ..observability.tracing import current_lineage
from ..publishing.draft import Draft
from ..publishing.publisher import prepare
from ..subscribing.subscriber import collect_local_classes
from ..subscribing.subscription import Subscription
from ..worker.async_handlers import AsyncHandlers
from ..worker.outcome import Outcome
from ..worker.processor import Processor

#: ``drain`` fails after this number of deliveries.
MAX_DELIVERIES = 10_000
#: The name of the stream for raw subjects outside the application's own stream.
ELSEWHERE = "elsewhere"


@dataclass(frozen=True, slots=True)
class Published:
    """A message that the application published.

    :param message: the decoded payload.
    :param envelope: the whole decoded envelope.
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
    """A subscriber's processor, and the stream from which it receives."""

    stream: str
    processor: Processor


class TestBroker:
    """Replaces the application's broker until ``close``; also a context manager.

    :param app: an application with the extension.
    :param others: more applications, which share the broker: messages that one publishes reach
        the subscribers of all. ``deliver`` publishes for the first.
    """

    __test__ = False  # its name begins with Test, and pytest would collect it

    def __init__(self, app: Flask, *others: Flask) -> None:
        collect_local_classes()  # those of earlier tests
        self._states = [_state_of(one) for one in (app, *others)]
        self._state = self._states[0]
        self._clock = VirtualClock()
        self._broker = MemoryBroker(self._clock)
        self._async = AsyncHandlers()
        #: The outcome of each delivery, in order.
        self.outcomes: list[Outcome] = []
        self._replaced = [state.use_broker(self._broker) for state in self._states]
        self._prepare()

    def close(self) -> None:
        """Restore the application's own broker."""
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
        """The messages that were published, oldest first, with pending outbox rows at the end.

        Bytes that are not a message (see ``deliver``) are not included.
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
        """Return the published messages of a topic, which may have the wildcards * and >."""
        pattern = normalize_topic(topic, wildcards=True)
        return [one for one in self.published if matches(pattern, topic_of(one.subject))]

    def assert_published(self, topic: str, /, **subset: Any) -> Published:
        """Assert that a message was published to ``topic`` whose payload has these values.

        :param topic: may have wildcards.
        :param subset: keys and values of the payload.
        :returns: the first such message.
        :raises AssertionError: there is none; the error lists the published messages.
        """
        candidates = self.published_to(topic)
        for one in candidates:
            if _has(one.message, subset):
                return one
        raise AssertionError(self._explain(topic, subset, candidates))

    def assert_not_published(self, topic: str, /, **subset: Any) -> None:
        """Assert that no message was published to ``topic`` whose payload has these values."""
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
        """The dead letters, oldest first."""
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
        """Publish a message as somebody else would, and ``drain``.

        :param message: a payload; bytes are delivered unchanged, so they include the envelope.
        :param producer: the app that published it; default: this app.
        :param headers: more headers.
        :param retries: see ``drain``.
        :param raise_errors: see ``drain``.
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
        """Publish a message of another system on a NATS subject, and ``drain``.

        :param data: bytes, or a value to encode as JSON; no envelope is added.
        :param headers: the headers.
        :param retries: see ``drain``.
        :param raise_errors: see ``drain``.
        :returns: the number of deliveries made.
        """
        self._prepare()  # creates the streams of other systems that subscribers name
        payload = data if isinstance(data, bytes) else encode_value(data)
        outgoing = Message(subject, payload, Headers(headers or {}))
        with self._connected():
            (result,) = self._broker.submit([outgoing], 1.0).results
        if isinstance(result, Exception):
            raise result
        return self.drain(retries=retries, raise_errors=raise_errors)

    def drain(self, *, retries: bool = True, raise_errors: bool = False) -> int:
        """Run the subscribers until nothing is left to do, moving the clock to each retry.

        Handlers run in this thread, one message at a time, each in its own application context.
        Messages that they publish are delivered too.

        :param retries: False does not move the clock: messages that failed or are not due wait.
        :param raise_errors: raise a handler's exception after its message was settled as in
            production; except ``Retry``, ``Discard`` and ``DeadLetter``, by which a handler
            decides what happens to its message.
        :returns: the number of deliveries; 0 while disconnected.
        :raises AssertionError: there is no end, because handlers keep publishing to each other.
        """
        seats, count = self._prepare(), 0
        while True:
            for outcome in self._deliveries(seats):
                count += 1
                if raise_errors:
                    _raise(outcome)
                if count > MAX_DELIVERIES:
                    raise AssertionError(
                        f"After {count} deliveries there are still more: do handlers publish what "
                        "makes them run again?"
                    )
            if not retries or not self._move_to_next_retry(seats):
                return count

    def step(self) -> Outcome | None:
        """Make the next delivery that is due, without moving the clock.

        :returns: its outcome, as in ``outcomes``; None if nothing is due.
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
        """Move the clock that retries, delays and ``ack_wait`` use."""
        self._broker.advance(seconds)
        for state in self._states:
            if state.persistence is not None:
                state.persistence.database.skew += seconds

    @property
    def _streams(self) -> list[str]:
        """The main streams of the applications; one, if they share an environment."""
        return list(dict.fromkeys(state.settings.stream for state in self._states))

    def _prepare(self) -> list[_Seat]:
        """Create the streams and consumers of all subscribers.

        Consumers with ``deliver_policy="new"`` start here.

        :returns: an empty list while disconnected.
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
        context = partial(_context, state)
        processors = state.make_processors(state.subscriptions(), self._async.run, context)
        for processor in processors:
            config = self._consumer(state, processor.subscription)
            self._broker.add_consumer(config)
            yield _Seat(config.stream, processor)

    def _consumer(self, state: AppState, subscription: Subscription) -> ConsumerConfig:
        """Return the subscription's consumer; creates the stream if it is another system's."""
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
        """Relay rows and deliver messages that are due, one for each subscriber in turn."""
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
        """Send due outbox rows; a publish that fails because of a fault is retried."""
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
        """Fail the next ``count`` publishes with a ``PublishError``; they are not stored."""
        self._broker.fail_publishes(count)

    def duplicate(self) -> None:
        """Redeliver all acknowledged messages at the next ``drain``."""
        self._broker.duplicate()

    def drop_acks(self, count: int = 1) -> None:
        """Lose the next ``count`` acknowledgements; those messages are redelivered."""
        self._broker.drop_acks(count)

    def disconnect(self) -> None:
        """Cut the connection: publishes raise ``NotConnected`` and nothing is delivered."""
        self._broker.disconnect()

    def reconnect(self) -> None:
        """Restore the connection."""
        self._broker.reconnect()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Access the streams even while the application is disconnected."""
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
    """Push the application context of one message.

    If the test runs in a transaction, this is a savepoint in it, so that the rollback of a
    handler that fails undoes the handler's changes and keeps the test's.
    """
    persistence = state.persistence
    isolated = persistence.database.isolated() if persistence else nullcontext()
    with isolated, state.app.app_context():
        yield


def _raise(outcome: Outcome) -> None:
    """Raise the error of an outcome, unless it is a handler's verdict."""
    if outcome.error is not None and not isinstance(outcome.error, HandlerVerdict):
        raise outcome.error


def _published(stored: StoredMessage) -> Published | None:
    received = read_or_none(stored)
    if received is None:
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
