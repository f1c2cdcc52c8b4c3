"""From what a view says to a stored message: prepare, hand over, wait.

One path for all: a ``Draft`` goes through the publish middleware and is encoded to a ``Message``,
which is either written to the outbox, in the caller's transaction, or handed to the broker
together with others, whose ``StoredAck`` becomes the ``PublishReceipt``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ..brokers.base import Broker, Result, StoredAck, Ticket
from ..brokers.storing import checked
from ..brokers.wire import header_block
from ..config.parsers import seconds as parse_seconds
from ..config.settings import Settings
from ..errors import (
    ConfigurationError,
    EncodingError,
    PayloadTooLarge,
    PublishError,
)
from ..messages.envelope import (
    SCHEMA_VERSION,
    Envelope,
    Lineage,
    check_identifier,
    check_traceparent,
    headers_for,
    resource_id_of,
)
from ..messages.ids import format_timestamp, new_event_id, now_timestamp
from ..messages.plain import message_type_of, plain_object
from ..messages.subjects import subject_for
from ..middleware import compose
from ..signals import message_published
from .breaker import CircuitBreaker
from .draft import Draft, Prepared, Publication, PublishReceipt

if TYPE_CHECKING:
    from concurrent.futures import Future

#: More than what stands around the name and the value of a header, and around all of them.
_HEADER_ROOM = 16
_NO_IDS = (None, None, None, None)
_ID_NAMES = ("event_id", "trace_id", "correlation_id", "causation_id")


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


class Outbox(Protocol):
    """What publishing needs of the outbox."""

    def add(self, prepared: Sequence[Prepared]) -> list[bool]:
        """Add rows to the caller's transaction; whether each was there already."""

    def insert(self, session: Any, prepared: Sequence[Prepared]) -> None:
        """Insert rows at once, inside a flush of the session."""


class Ports(Protocol):
    """What publishing needs of the application; see ``app.state.AppState``."""

    @property
    def settings(self) -> Settings:
        """The application's settings."""

    @property
    def publish_middleware(self) -> Sequence[Any]:
        """The publish middleware, now and as it grows."""

    @property
    def lineage(self) -> Callable[[], Lineage]:
        """Returns the ids that a message inherits."""

    @property
    def writer(self) -> Outbox | None:
        """The outbox, once something has asked for it."""

    def broker(self) -> Broker:
        """Return the broker, made at the first call."""

    def outbox(self) -> Outbox:
        """Return the outbox; ConfigurationError where there is no database."""

    def before_direct(self) -> None:
        """Look at the caller's session before a publish that bypasses the outbox."""

    def emit(self, signal: Any, **arguments: Any) -> None:
        """Send a signal for the application."""


class Publisher:
    """Publishes for one application."""

    def __init__(self, app: Ports) -> None:
        settings = app.settings
        self.breaker = CircuitBreaker(settings.breaker_threshold, settings.breaker_reset)
        self._app = app
        self._settings = settings
        #: Whether the user's code may run in the broker's thread: ``publish_nowait`` was used.
        self._calls_back = False

    # --- publishing

    def publish(self, draft: Draft, timeout: float | None = None) -> PublishReceipt:
        """Publish one message and wait until it is stored."""
        if not self._app.publish_middleware:
            prepared = [prepare(draft, self._settings, self._app.lineage())]
            if prepared[0].outbox:
                return self._write(prepared)[0]
            return self._send(prepared, timeout)[0]

        def publish(inner: Draft) -> Publication:
            prepared = self._prepare_for_middleware(inner)
            self.send([prepared], timeout)
            return _publication_of(prepared)

        result = compose(self._app.publish_middleware, publish)(draft)
        if not isinstance(result, Publication) or result.receipt is None:
            raise _no_result(result)
        return result.receipt

    def publish_all(
        self, drafts: Iterable[Draft], timeout: float | None = None
    ) -> list[PublishReceipt]:
        """Publish several messages with one wait; nothing is sent unless all can be encoded."""
        return self.send(self.prepare_all(drafts), timeout)

    def publish_nowait(self, draft: Draft, timeout: float | None = None) -> Future[PublishReceipt]:
        """Publish and return a future of the receipt."""
        from concurrent.futures import Future  # not for everybody: it takes a hundredth of Flask

        future: Future[PublishReceipt] = Future()
        future.set_running_or_notify_cancel()

        def done(result: PublishReceipt | Exception) -> None:
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        self.start(draft, timeout, done)
        return future

    def start(
        self,
        draft: Draft,
        timeout: float | None,
        done: Callable[[PublishReceipt | Exception], None],
    ) -> None:
        """Publish, and have ``done`` called with the receipt or the error, in any thread.

        It is called before this returns if the message is written to the outbox. What is known
        before anything was sent is raised.
        """
        prepared = self.prepare_all([draft])
        if prepared[0].outbox:
            done(self.send(prepared, timeout)[0])
            return
        seconds = self._settings.publish_timeout if timeout is None else timeout
        broker = self._app.broker()

        def finish(results: Sequence[Result]) -> None:
            try:
                receipt = self._receipts(prepared, results)[0]
            except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
                # Without the frames of the loop's thread: through them it would keep itself alive.
                done(error.with_traceback(None))
            else:
                done(receipt)

        def answered(ticket: Ticket) -> None:
            results = ticket.results_within(0)
            result = results[0]
            if isinstance(result, StoredAck) and result.duplicate and not broker.reads_denied:
                from ..brokers.threads import start_thread  # brings asyncio

                def look() -> None:
                    finish(checked(prepared, results, broker, seconds))

                # The broker's thread must not wait for what it is asked itself.
                start_thread(look, "natspubsub-duplicate")
            else:
                finish(results)

        self._calls_back = True
        try:
            if self.breaker.failures:
                self.breaker.check()
            broker.submit(prepared, seconds).on_done(answered)
        except Exception as error:
            fail(prepared, error)
            raise

    def prepare_all(self, drafts: Iterable[Draft]) -> list[Prepared]:
        """Run drafts through the middleware and encode them."""
        middleware = self._app.publish_middleware
        if not middleware:
            lineage = self._app.lineage()
            return [prepare(draft, self._settings, lineage) for draft in drafts]
        made: dict[int, Prepared] = {}

        def make(draft: Draft) -> Publication:
            prepared = self._prepare_for_middleware(draft)
            publication = _publication_of(prepared)
            made[id(publication)] = prepared
            return publication

        wrapped = compose(middleware, make)
        with failing(made.values()):
            publications = [wrapped(draft) for draft in drafts]
            for publication in publications:
                if id(publication) not in made:
                    raise _no_result(publication)
        return [made[id(publication)] for publication in publications]

    def _prepare_for_middleware(self, draft: Draft) -> Prepared:
        prepared = prepare(draft, self._settings, self._app.lineage())
        publication = Publication(prepared.event_id, prepared.topic, prepared.subject)
        return msgspec.structs.replace(prepared, publication=publication)

    def send(
        self, prepared: Sequence[Prepared], timeout: float | None = None
    ) -> list[PublishReceipt]:
        """Send what ``prepare_all`` made, and wait until all of it is stored.

        What goes through the outbox is written first; it is the caller's transaction that
        keeps it or, if the rest fails and the caller rolls back, drops it.
        """
        rows = [item for item in prepared if item.outbox]
        with failing(prepared):
            if not rows:
                return self._send(prepared, timeout)
            written = iter(self._write(rows))
            sent = iter(self._send([item for item in prepared if not item.outbox], timeout))
        return [next(written if item.outbox else sent) for item in prepared]

    def insert(self, session: Any, drafts: Iterable[Draft]) -> None:
        """Write messages to the outbox inside a flush of ``session``."""
        prepared = self.prepare_all(drafts)
        with failing(prepared):
            self._app.outbox().insert(session, prepared)
        _outbox_receipts(prepared, [False] * len(prepared))

    # --- handing over

    def _write(self, rows: Sequence[Prepared]) -> list[PublishReceipt]:
        outbox = self._app.writer or self._app.outbox()
        limit = self._app.broker().max_payload
        for row in rows:
            texts = "".join(row.headers) + "".join(row.headers.values())
            # As many bytes as there may be at most; exactly only where that could be too many.
            if len(row.data) + 4 * len(texts) + _HEADER_ROOM * (len(row.headers) + 1) > limit:
                size = len(header_block(row.headers)) + len(row.data)
                if size > limit:
                    raise PayloadTooLarge.of(row.topic, size, limit)
        return _outbox_receipts(rows, outbox.add(rows))

    def _send(self, prepared: Sequence[Prepared], timeout: float | None) -> list[PublishReceipt]:
        if not prepared:
            return []
        self._app.before_direct()
        if self.breaker.failures:
            self.breaker.check()
        seconds = self._settings.publish_timeout if timeout is None else timeout
        broker = self._app.broker()
        if self._calls_back and broker.is_own_thread:
            raise PublishError(
                "A receiver of message_published, or a callback of publish_nowait, cannot wait "
                "for another publish: it runs in the thread that would have to send it.",
                "Use publish_nowait there.",
            )
        results: Sequence[Result] = broker.submit(prepared, seconds).results_within(seconds)
        for result in results:
            if type(result) is StoredAck and result.duplicate:
                results = checked(prepared, results, broker, seconds)
                break
        return self._receipts(prepared, results)

    def _receipts(
        self, prepared: Sequence[Prepared], results: Sequence[Result]
    ) -> list[PublishReceipt]:
        """Return the receipts.

        :raises PublishError: one was not stored: the error of all, or ``PartlyPublished``.
        """
        receipts = []
        for item, ack in zip(prepared, results, strict=True):
            if isinstance(ack, PublishError):
                continue
            receipt = PublishReceipt(
                item.event_id,
                item.topic,
                item.subject,
                ack.stream,
                ack.sequence,
                ack.duplicate,
                "stored",
            )
            receipts.append(receipt)
            if item.publication is not None:
                item.publication.set_result(receipt)
        if message_published.receivers:
            for receipt in receipts:
                self._app.emit(message_published, receipt=receipt)
        if len(receipts) < len(prepared):
            raise self._failure(prepared, results, receipts)
        if self.breaker.failures:
            self.breaker.success()
        return receipts

    def _failure(
        self,
        prepared: Sequence[Prepared],
        results: Sequence[Result],
        receipts: Sequence[PublishReceipt],
    ) -> PublishError:
        """Count the failure, tell middleware, and return the error for all of the messages."""
        errors = [result for result in results if isinstance(result, PublishError)]
        if any(error.temporary for error in errors):
            self.breaker.failure()
        for item, result in zip(prepared, results, strict=True):
            if item.publication is not None and isinstance(result, PublishError):
                item.publication.set_result(result)
        if not receipts and len({type(error) for error in errors}) == 1:
            return errors[0]
        stored = iter(receipts)
        return PartlyPublished(
            [one if isinstance(one, PublishError) else next(stored) for one in results]
        )


def prepare(draft: Draft, settings: Settings, lineage: Lineage) -> Prepared:
    """Check and encode; every error here is the caller's to mend, and nothing was sent.

    :param lineage: the ids that the message inherits.
    """
    subject = subject_for(settings.env, settings.app_name, draft.topic)
    envelope = _envelope(draft, settings.app_name, lineage)
    traceparent = lineage.traceparent
    if draft.traceparent is not None:
        traceparent = check_traceparent(draft.traceparent)
    headers = headers_for(envelope, draft.headers, traceparent)
    data, event_id = envelope.encode(), envelope.event_id
    named = draft.event_id is not None
    if draft.outbox if draft.outbox is not None else settings.use_outbox:
        when = _when(draft)
        return Prepared(subject, data, headers, event_id, draft.topic, True, named, *when)
    if draft.delay is not None or draft.available_at is not None:
        raise _needs_outbox()
    return Prepared(subject, data, headers, event_id, draft.topic, False, named)


def _envelope(draft: Draft, producer: str, lineage: Lineage) -> Envelope:
    own = draft.event_id, draft.trace_id, draft.correlation_id, draft.causation_id
    if own != _NO_IDS:
        for value, name in zip(own, _ID_NAMES, strict=True):
            if value is not None:
                check_identifier(value, name)
    event_id, trace_id, correlation_id, causation_id = own
    message = plain_object(draft.message)
    message_type = draft.message_type or message_type_of(draft.message)
    domain = resource = action = resource_id = None
    if draft.event is not None:
        domain, resource, action = draft.event
        resource_id = resource_id_of(message)
    at = draft.occurred_at
    return Envelope(
        event_id=event_id or new_event_id(),
        topic=draft.topic,
        producer=producer,
        occurred_at=now_timestamp() if at is None else format_timestamp(at),
        schema_version=SCHEMA_VERSION,
        message=message,
        message_type=message_type,
        trace_id=trace_id or lineage.trace_id,
        domain=domain,
        resource=resource,
        action=action,
        resource_id=resource_id,
        correlation_id=correlation_id or lineage.correlation_id,
        causation_id=causation_id or lineage.causation_id,
    )


@contextmanager
def failing(prepared: Iterable[Prepared]) -> Iterator[None]:
    """Call ``fail`` with an error of the block."""
    try:
        yield
    except Exception as error:
        fail(prepared, error)
        raise


def fail(prepared: Iterable[Prepared], error: Exception) -> None:
    """Tell middleware of the error that keeps these messages from being published."""
    for item in prepared:
        if item.publication is not None:
            item.publication.set_result(error)


def _outbox_receipts(rows: Sequence[Prepared], known: Sequence[bool]) -> list[PublishReceipt]:
    """Make the receipts of rows, and tell middleware.

    :param known: for each row, whether the outbox had it already.
    """
    receipts = []
    for row, there in zip(rows, known, strict=True):
        receipt = PublishReceipt(row.event_id, row.topic, row.subject, None, None, there, "outbox")
        receipts.append(receipt)
        if row.publication is not None:
            row.publication.set_result(receipt)
    return receipts


def _needs_outbox() -> ConfigurationError:
    return ConfigurationError(
        "A message with delay= or available_at= needs the outbox, which keeps it until then.",
        "Publish it with outbox=True, or set NATSPUBSUB_USE_OUTBOX.",
    )


def _when(draft: Draft) -> tuple[str | None, float | None, float | None]:
    """Return the ordering key, the delay in seconds, and the time since the epoch of a draft."""
    key, at, delay = draft.ordering_key, draft.available_at, None
    if key is not None:
        check_identifier(key, "ordering_key")
    try:
        delay = None if draft.delay is None else parse_seconds(draft.delay)
    except ValueError as error:
        raise EncodingError(
            f"delay is {draft.delay!r}.", f"Allowed: {error}.", path="delay"
        ) from None
    if at is not None and getattr(at, "tzinfo", None) is None:
        raise EncodingError(
            f"available_at is {at!r}.", "Allowed: an aware datetime.", path="available_at"
        )
    return key, delay, None if at is None else at.timestamp()


def _publication_of(prepared: Prepared) -> Publication:
    assert prepared.publication is not None
    return prepared.publication


def _no_result(got: object) -> PublishError:
    return PublishError(
        f"A publish middleware returned {type(got).__name__} instead of the result of call_next().",
        "Return call_next(), or raise to refuse the message.",
    )
