"""From what a view says to a stored message: prepare, hand over, wait.

One path for all: a ``Draft`` goes through the publish middleware, becomes a ``Prepared``
message, and is either written to the outbox, in the caller's transaction, or handed to the
broker together with others, whose ``StoredAck`` becomes the ``PublishReceipt``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, cast

from ..brokers.base import Broker, StoredAck, Ticket
from ..brokers.wire import header_block
from ..errors import PayloadTooLarge, PublishError
from ..settings import Settings
from .breaker import CircuitBreaker
from .draft import Draft, Prepared, PublishReceipt, prepare

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


Around = Callable[[Callable[[Draft], Any]], Callable[[Draft], Any]]


class Publisher:
    """Publishes for one application.

    :param broker: returns the broker, making it at the first call.
    :param around: wraps a function of a draft in the publish middleware.
    :param published: told of every message that was stored.
    :param outbox: returns the outbox; ConfigurationError where there is no database.
    :param before_direct: called before a publish that goes round the outbox.
    """

    def __init__(
        self,
        settings: Settings,
        broker: Callable[[], Broker],
        around: Around,
        published: Callable[[PublishReceipt], None],
        outbox: Callable[[], Outbox],
        before_direct: Callable[[], None],
    ) -> None:
        self.breaker = CircuitBreaker(settings.breaker_threshold, settings.breaker_reset)
        self._settings = settings
        self._broker = broker
        self._around = around
        self._published = published
        self._outbox = outbox
        self._before_direct = before_direct

    # --- publishing

    def publish(self, draft: Draft, timeout: float | None = None) -> PublishReceipt:
        """Publish one message and wait until it is stored."""

        def innermost(inner: Draft) -> PublishReceipt:
            return self.send([self._prepare(inner)], timeout)[0]

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
        if prepared[0].outbox:
            future.set_result(self._write(prepared)[0])
            return future

        def done(ticket: Ticket) -> None:
            try:
                future.set_result(self._receipts(prepared, ticket)[0])
            except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
                future.set_exception(error)

        self._submit(prepared, self._timeout(timeout)).on_done(done)
        return future

    def prepare_all(self, drafts: Iterable[Draft]) -> list[Prepared]:
        """Run drafts through the middleware and encode them."""
        wrapped = self._around(self._prepare)
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

    def _prepare(self, draft: Draft) -> Prepared:
        return prepare(draft, self._settings)

    def _timeout(self, timeout: float | None) -> float:
        return self._settings.publish_timeout if timeout is None else timeout


def _no_result(got: object) -> PublishError:
    return PublishError(
        f"A publish middleware returned {type(got).__name__} instead of the result of call_next().",
        "Return call_next(), or raise to refuse the message.",
    )
