"""From what a view says to a stored message: draft, encode, hand over, wait.

One path for all: a ``Draft`` goes through the publish middleware, becomes a ``Prepared``
message (every error of the caller's making shows here), is handed to the broker together with
others, and its ``StoredAck`` becomes the ``PublishReceipt``.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from ..brokers.base import Broker, OutgoingMessage, StoredAck, Ticket
from ..errors import InvalidTopic, PublishError
from ..messages import codec
from ..messages.envelope import Envelope, check_identifier, headers_for, resource_id_of
from ..messages.ids import derived_event_id, format_timestamp, new_event_id, now_timestamp
from ..messages.lineage import current_lineage
from ..messages.plain import to_plain
from ..messages.subjects import subject_for
from ..settings import Settings
from .breaker import CircuitBreaker

# The broker settles each message within its timeout and a half second; a wait that is longer
# than this in addition means that the broker's thread itself is stuck.
STUCK = 1.0


@dataclass(frozen=True, slots=True)
class PublishReceipt:
    """What became of one published message.

    ``stream`` and ``sequence`` say where it is stored (None while it is in the outbox);
    ``duplicate`` is True when the stream had this ``event_id`` already.
    """

    event_id: str
    topic: str
    subject: str
    stream: str | None
    sequence: int | None
    duplicate: bool
    status: Literal["stored", "outbox"]


class PartlyPublished(PublishError):
    """Of several messages published together, some were not stored.

    :param results: for each message, in order, its receipt or its error.
    """

    code = "partly-published"

    def __init__(self, results: Sequence[PublishReceipt | PublishError]) -> None:
        failed = [result for result in results if isinstance(result, PublishError)]
        unknown = any(error.outcome == "unknown" for error in failed)
        super().__init__(
            f"{len(failed)} of {len(results)} messages were not stored; the first: {failed[0]}",
            outcome="unknown" if unknown else "not_sent",
        )
        self.results = list(results)


@dataclass(slots=True)
class Draft:
    """A message as its publisher gives it; publish middleware may change it.

    :param topic: as the caller wrote it.
    :param message: the payload: dict, dataclass, msgspec Struct or pydantic model.
    :param event: domain, resource and action of the event form.
    """

    topic: str
    message: Any
    event_id: str | None = None
    trace_id: str | None = None
    occurred_at: dt.datetime | None = None
    correlation_id: str | None = None
    causation_id: str | None = None
    message_type: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    event: tuple[str, str, str] | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A message that can be sent: checked and encoded."""

    event_id: str
    topic: str
    outgoing: OutgoingMessage

    def receipt(self, ack: StoredAck) -> PublishReceipt:
        """Make the receipt of a stored message."""
        return PublishReceipt(
            self.event_id,
            self.topic,
            self.outgoing.subject,
            ack.stream,
            ack.sequence,
            ack.duplicate,
            "stored",
        )


Around = Callable[[Callable[[Draft], Any]], Callable[[Draft], Any]]


class Publisher:
    """Publishes for one application.

    :param broker: returns the broker, making it at the first call.
    :param around: wraps a function of a draft in the publish middleware.
    :param published: told of every receipt.
    """

    def __init__(
        self,
        settings: Settings,
        broker: Callable[[], Broker],
        around: Around,
        published: Callable[[PublishReceipt], None],
    ) -> None:
        self.breaker = CircuitBreaker(settings.breaker_threshold, settings.breaker_reset)
        self._settings = settings
        self._broker = broker
        self._around = around
        self._published = published

    # --- drafts

    def drafts(self, topics: Any, message: Any, **options: Any) -> list[Draft]:
        """Make a draft for the topic or for each of a list; later ids derive from a given one."""
        names = list(topics) if isinstance(topics, (list, tuple)) else [topics]
        if not names:
            raise InvalidTopic("The list of topics is empty.", "Give one topic or more.")
        drafts = [Draft(topic, message, **options) for topic in names]
        for draft in drafts[1:]:
            if draft.event_id is not None:
                draft.event_id = derived_event_id(draft.event_id, draft.topic)
        return drafts

    def prepare(self, draft: Draft) -> Prepared:
        """Check and encode; every error here is the caller's to mend, and nothing was sent."""
        settings = self._settings
        subject = subject_for(settings.env, settings.app_name, draft.topic)
        lineage = current_lineage()
        domain, resource, action = draft.event or (None, None, None)
        envelope = Envelope(
            event_id=_identifier(draft.event_id, "event_id") or new_event_id(),
            topic=draft.topic,
            producer=settings.app_name,
            occurred_at=format_timestamp(draft.occurred_at)
            if draft.occurred_at
            else now_timestamp(),
            message=codec.encode_object(draft.message),
            message_type=draft.message_type or codec.message_type_of(draft.message),
            trace_id=_identifier(draft.trace_id, "trace_id") or lineage.trace_id,
            domain=domain,
            resource=resource,
            action=action,
            resource_id=resource_id_of(to_plain(draft.message)) if draft.event else None,
            correlation_id=_identifier(draft.correlation_id, "correlation_id")
            or lineage.correlation_id,
            causation_id=_identifier(draft.causation_id, "causation_id") or lineage.causation_id,
        )
        headers = headers_for(envelope, draft.headers, lineage.traceparent)
        outgoing = OutgoingMessage(subject, envelope.encode(), headers)
        return Prepared(envelope.event_id, draft.topic, outgoing)

    # --- publishing

    def publish(self, draft: Draft, timeout: float | None = None) -> PublishReceipt:
        """Publish one message and wait until it is stored."""

        def innermost(inner: Draft) -> PublishReceipt:
            return self.send([self.prepare(inner)], timeout)[0]

        receipt = self._around(innermost)(draft)
        if not isinstance(receipt, PublishReceipt):
            raise _no_result(receipt)
        return receipt

    def publish_all(
        self, drafts: Iterable[Draft], timeout: float | None = None
    ) -> list[PublishReceipt]:
        """Publish several messages with one wait; nothing is sent unless all can be encoded."""
        return self.send(self.prepare_all(drafts), timeout)

    def publish_nowait(self, draft: Draft, timeout: float | None = None) -> Future[PublishReceipt]:
        """Publish and return a future of the receipt."""
        prepared = self.prepare_all([draft])
        future: Future[PublishReceipt] = Future()
        future.set_running_or_notify_cancel()

        def done(ticket: Ticket) -> None:
            try:
                future.set_result(self._receipts(prepared, ticket)[0])
            except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
                future.set_exception(error)

        self._submit(prepared, self._timeout(timeout)).on_done(done)
        return future

    def prepare_all(self, drafts: Iterable[Draft]) -> list[Prepared]:
        """Run drafts through the middleware and encode them."""
        wrapped = self._around(self.prepare)
        prepared = [wrapped(draft) for draft in drafts]
        for item in prepared:
            if not isinstance(item, Prepared):
                raise _no_result(item)
        return prepared

    def send(
        self, prepared: Sequence[Prepared], timeout: float | None = None
    ) -> list[PublishReceipt]:
        """Send what ``prepare_all`` made, and wait until all of it is stored."""
        if not prepared:
            return []
        seconds = self._timeout(timeout)
        ticket = self._submit(prepared, seconds)
        if not ticket.wait(seconds + STUCK):
            self.breaker.failure()
            raise PublishError(
                f"The broker's thread did not answer within {seconds + STUCK:g} s.",
                "A thread that keeps the interpreter busy may starve it.",
                outcome="unknown",
            )
        return self._receipts(prepared, ticket)

    def _submit(self, prepared: Sequence[Prepared], seconds: float) -> Ticket:
        self.breaker.check()
        return self._broker().submit([item.outgoing for item in prepared], seconds)

    def _receipts(self, prepared: Sequence[Prepared], ticket: Ticket) -> list[PublishReceipt]:
        results = [
            item.receipt(result) if isinstance(result, StoredAck) else cast(PublishError, result)
            for item, result in zip(prepared, ticket.results, strict=True)
        ]
        receipts = [result for result in results if isinstance(result, PublishReceipt)]
        for receipt in receipts:
            self._published(receipt)
        if len(receipts) == len(results):
            self.breaker.success()
            return receipts
        errors = [result for result in results if isinstance(result, PublishError)]
        if any(error.temporary for error in errors):
            self.breaker.failure()
        if receipts or len({type(error) for error in errors}) > 1:
            raise PartlyPublished(results)
        raise errors[0]

    def _timeout(self, timeout: float | None) -> float:
        return self._settings.publish_timeout if timeout is None else timeout


def _identifier(value: str | None, name: str) -> str | None:
    return None if value is None else check_identifier(value, name)


def _no_result(got: object) -> PublishError:
    return PublishError(
        f"A publish middleware returned {type(got).__name__} instead of the result of call_next().",
        "Return call_next(), or raise to refuse the message.",
    )
