"""From what a view says to a stored message: prepare, hand over, wait.

One path for all: a ``Draft`` goes through the publish middleware, becomes a ``Prepared``
message, and is either written to the outbox, in the caller's transaction, or handed to the
broker together with others, whose ``StoredAck`` becomes the ``PublishReceipt``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..brokers.base import Broker, StoredAck, Ticket
from ..brokers.storing import Result, checked
from ..brokers.wire import header_block
from ..config.settings import Settings
from ..errors import PayloadTooLarge, PublishError
from ..messages.lineage import current_lineage
from ..signals import message_published
from .breaker import CircuitBreaker
from .draft import Draft, Prepared, PublishReceipt, prepare

if TYPE_CHECKING:
    from concurrent.futures import Future

# The broker settles each message within its timeout and a half second; a wait that is longer
# than this in addition means that the broker's thread itself is stuck.
STUCK = 1.0


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


Compose = Callable[[Sequence[Any], Callable[[Draft], Any]], Callable[[Draft], Any]]


class Publisher:
    """Publishes for one application.

    :param broker: returns the broker, making it at the first call.
    :param middleware: the publish middleware, now and as it grows.
    :param compose: wraps a function of a draft in middleware.
    :param published: told of every message that was stored.
    :param outbox: returns the outbox; ConfigurationError where there is no database.
    :param before_direct: called before a publish that goes round the outbox.
    """

    def __init__(
        self,
        settings: Settings,
        broker: Callable[[], Broker],
        middleware: Sequence[Any],
        compose: Compose,
        published: Callable[[PublishReceipt], None],
        outbox: Callable[[], Outbox],
        before_direct: Callable[[], None],
    ) -> None:
        self.breaker = CircuitBreaker(settings.breaker_threshold, settings.breaker_reset)
        self._settings = settings
        self._broker = broker
        self._middleware = middleware
        self._compose = compose
        self._published = published
        self._outbox = outbox
        self._before_direct = before_direct
        #: Whether the user's code may run in the broker's thread: ``publish_nowait`` was used.
        self._calls_back = False

    # --- publishing

    def publish(self, draft: Draft, timeout: float | None = None) -> PublishReceipt:
        """Publish one message and wait until it is stored."""
        if not self._middleware:
            return self._publish(draft, timeout)
        publish = self._compose(self._middleware, lambda inner: self._publish(inner, timeout))
        receipt = publish(draft)
        if not isinstance(receipt, PublishReceipt):
            raise _no_result(receipt)
        return receipt

    def _publish(self, draft: Draft, timeout: float | None) -> PublishReceipt:
        prepared = prepare(draft, self._settings, current_lineage())
        if prepared.outbox:
            return self._write([prepared])[0]
        return self._send([prepared], timeout)[0]

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
            done(self._write(prepared)[0])
            return

        def settle(results: Sequence[Result]) -> None:
            try:
                receipt = self._receipts(prepared, results)[0]
            except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
                # Without the frames of the loop's thread: through them it would keep itself alive.
                done(error.with_traceback(None))
            else:
                done(receipt)

        def answered(ticket: Ticket) -> None:
            result = ticket.results[0]
            if isinstance(result, StoredAck) and result.duplicate and not broker.reads_denied:
                from ..brokers.threads import start_thread  # brings asyncio

                def look() -> None:
                    settle(checked([prepared[0].outgoing], ticket.results, broker, seconds))

                # The broker's thread must not wait for what it is asked itself.
                start_thread(look, "natspubsub-duplicate")
            else:
                settle(ticket.results)

        if self.breaker.failures:
            self.breaker.check()
        seconds = self._settings.publish_timeout if timeout is None else timeout
        self._calls_back = True
        broker = self._broker()
        broker.submit([prepared[0].outgoing], seconds).on_done(answered)

    def prepare_all(self, drafts: Iterable[Draft]) -> list[Prepared]:
        """Run drafts through the middleware and encode them."""
        if not self._middleware:
            lineage = current_lineage()
            return [prepare(draft, self._settings, lineage) for draft in drafts]
        wrapped = self._compose(
            self._middleware, lambda draft: prepare(draft, self._settings, current_lineage())
        )
        prepared = [wrapped(draft) for draft in drafts]
        for item in prepared:
            if not isinstance(item, Prepared):
                raise _no_result(item)
        return prepared

    def send(
        self, prepared: Sequence[Prepared], timeout: float | None = None
    ) -> list[PublishReceipt]:
        """Send what ``prepare_all`` made, and wait until all of it is stored.

        What goes through the outbox is written first; it is the caller's transaction that
        keeps it or, if the rest fails and the caller rolls back, drops it.
        """
        rows = [item for item in prepared if item.outbox]
        if not rows:
            return self._send(prepared, timeout)
        written = iter(self._write(rows))
        sent = iter(self._send([item for item in prepared if not item.outbox], timeout))
        return [next(written if item.outbox else sent) for item in prepared]

    def _write(self, rows: Sequence[Prepared]) -> list[PublishReceipt]:
        outbox = self._outbox()
        limit = self._broker().max_payload
        for row in rows:
            size = len(header_block(row.outgoing.headers)) + len(row.outgoing.payload)
            if size > limit:
                raise PayloadTooLarge(
                    f"The message for {row.topic!r} has {size:,} bytes with its headers; "
                    f"the server takes {limit:,}.",
                    "Publish a reference to the data instead, or raise max_payload there.",
                    size=size,
                    limit=limit,
                )
        known = outbox.add(rows)
        return [row.outbox_receipt(duplicate=there) for row, there in zip(rows, known, strict=True)]

    def _send(self, prepared: Sequence[Prepared], timeout: float | None) -> list[PublishReceipt]:
        if not prepared:
            return []
        self._before_direct()
        if self.breaker.failures:
            self.breaker.check()
        seconds = self._settings.publish_timeout if timeout is None else timeout
        broker = self._broker()
        if self._calls_back and broker.is_own_thread:
            raise PublishError(
                "A receiver of message_published, or a callback of publish_nowait, cannot wait "
                "for another publish: it runs in the thread that would have to send it.",
                "Use publish_nowait there.",
            )
        ticket = broker.submit([item.outgoing for item in prepared], seconds)
        if not ticket.wait(seconds + STUCK):
            self.breaker.failure()
            raise PublishError(
                f"The broker's thread did not answer within {seconds + STUCK:g} s.",
                "A thread that keeps the interpreter busy may starve it.",
                outcome="unknown",
            )
        results: Sequence[Result] = ticket.results
        for result in results:
            if type(result) is StoredAck and result.duplicate:
                results = checked([item.outgoing for item in prepared], results, broker, seconds)
                break
        return self._receipts(prepared, results)

    def _receipts(
        self, prepared: Sequence[Prepared], results: Sequence[Result]
    ) -> list[PublishReceipt]:
        receipts = []
        for item, result in zip(prepared, results, strict=True):
            if type(result) is StoredAck:
                receipts.append(item.receipt(result))
        if message_published.receivers:
            for receipt in receipts:
                self._published(receipt)
        if len(receipts) == len(prepared):
            if self.breaker.failures:
                self.breaker.success()
            return receipts
        raise self._failure(prepared, results)

    def _failure(self, prepared: Sequence[Prepared], answers: Sequence[Result]) -> PublishError:
        """Count the failure, and return the error for all: theirs, or ``PartlyPublished``."""
        results = [
            item.receipt(answer) if isinstance(answer, StoredAck) else cast(PublishError, answer)
            for item, answer in zip(prepared, answers, strict=True)
        ]
        errors = [result for result in results if isinstance(result, PublishError)]
        if any(error.temporary for error in errors):
            self.breaker.failure()
        if len(errors) < len(results) or len({type(error) for error in errors}) > 1:
            return PartlyPublished(results)
        return errors[0]


def _no_result(got: object) -> PublishError:
    return PublishError(
        f"A publish middleware returned {type(got).__name__} instead of the result of call_next().",
        "Return call_next(), or raise to refuse the message.",
    )
