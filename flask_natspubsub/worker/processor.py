"""What happens to one delivery, from top to bottom.

read -> context and trace -> app context -> inbox -> decode -> middleware -> handler -> commit ->
ack; on an error: retry later, drop, or dead letter first and then terminate. Everything about a
message's fate is decided here; threads, pulls and time limits are the worker's.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..brokers.base import Delivery
from ..deadletters.box import DeadLetterBox
from ..deadletters.replays import REPLAY_FOR, REPLAY_FORCE, forced_id, is_for
from ..errors import (
    DatabaseError,
    DeadLetter,
    Discard,
    HandlerInterrupted,
    HandlerTimeout,
    InboxBusy,
    NatsPubsubError,
    NeverFinished,
    Retry,
)
from ..messages.codec import as_received
from ..messages.envelope import Lineage
from ..messages.identity import Handling, handling, unnamed_handling
from ..messages.received import Received
from ..messages.subjects import topic_of
from ..middleware import compose
from ..observability import tracing
from ..signals import message_dead_lettered, message_handled, message_received, message_retried
from ..subscribing.context import CURRENT, DeliveryContext, MessageContext
from ..subscribing.reading import try_read
from ..subscribing.retry import (
    Drop,
    GiveUp,
    GiveUpReason,
    RetryLater,
    backoff_delay,
    classify,
    error_text,
)
from ..subscribing.subscription import Subscription
from ..subscribing.tracebacks import of_application, place_of_error
from .attempts import Attempts
from .outcome import Outcome, Result, report

#: Headers that each message is asked for.
_ASKED = (REPLAY_FOR, REPLAY_FORCE, "traceparent")
#: What a handler raises to say what is to become of the message; it is no failure.
_DELIBERATE = (Discard, DeadLetter, Retry)
#: Sends a signal of this package for the application.
Emit = Callable[..., None]


class Work(Protocol):
    """What a handler does in the database, still open."""

    def commit(self) -> bool:
        """Make it last; False, with nothing done, if another delivery was quicker."""


class Transactions(Protocol):
    """Opens the transaction that a handler works in; see ``inbox.Inbox``."""

    def begin(self, handling: Handling, *, once: bool) -> Work | None:
        """Begin; None if it must happen once only and has happened."""


class Processor:
    """Processes the deliveries of one subscription; used by many threads at once.

    :param app_context: makes the application context a message is handled in.
    :param emit: sends a signal.
    :param run_async: ``run_async(awaitable, timeout)`` runs what an ``async def`` handler returns,
        for at most ``timeout`` seconds.
    :param transactions: None where the application has no database for the inbox.
    """

    def __init__(
        self,
        subscription: Subscription,
        dead_letters: DeadLetterBox,
        app_context: Callable[[], AbstractContextManager[object]],
        emit: Emit,
        run_async: Callable[[Any, float], Any],
        transactions: Transactions | None = None,
    ) -> None:
        self.subscription = subscription
        self._dead_letters = dead_letters
        self._app_context = app_context
        self._emit = emit
        self._run_async = run_async
        self._transactions = transactions
        self._attempts = Attempts(subscription.max_deliver)
        self._deciders: dict[Delivery, str] = {}
        #: Since when handlers have been running, on the monotonic clock; None for those that
        #: ``run_async`` looks after. What is not here has not begun, or had nothing to wait for.
        self._clocks: dict[Delivery, float | None] = {}

    # --- the straight path

    def process(self, delivery: Delivery, failed: Callable[[], None] | None = None) -> Outcome:
        """Handle one delivery and settle it. Never raises.

        :param failed: called when the handler has raised, before the consequences.
        """
        started = time.perf_counter()
        received: Received | None = None
        try:
            received = self.subscription.read(delivery)
            addressee, forced, traceparent = map(delivery.headers.get, _ASKED)
            if addressee is not None and not is_for(delivery.headers, self.subscription):
                return self._settle(delivery, received, "skipped", started)
            event_id = received.event_id
            if forced is not None:
                event_id = forced_id(delivery.headers, event_id)
            ids = Lineage(
                received.trace_id, received.correlation_id, received.event_id, traceparent
            )
            return self._handle(delivery, received, ids, event_id, started)
        except BaseException as error:  # noqa: BLE001 - sys.exit() in a handler is a failure too
            if failed is not None:
                failed()
            return self._failed(delivery, received, error, started)
        finally:
            self._deciders.pop(delivery, None)
            if self._clocks:
                self._clocks.pop(delivery, None)

    def _handle(
        self, delivery: Delivery, received: Received, ids: Lineage, event_id: str, started: float
    ) -> Outcome:
        """Run the handler, with its context and ids in force, and settle the delivery.

        :param event_id: by which the inbox knows the message.
        """
        context = DeliveryContext.of(delivery, received, self.subscription.name)
        outer, before = tracing.enter(ids), CURRENT.set(context)
        try:
            with self._app_context():
                committed = self._work(delivery, received, context, event_id)
        finally:
            CURRENT.reset(before)
            tracing.leave(outer)
        if not committed:
            return self._settle(delivery, received, "skipped", started)
        outcome = self._settle(delivery, received, "handled", started)
        if message_handled.receivers:
            self._emit(message_handled, context=context, seconds=outcome.seconds)
        return outcome

    def _settle(
        self, delivery: Delivery, received: Received, result: Result, started: float
    ) -> Outcome:
        """Acknowledge, after the log has the line: it must not lack what will not come again."""
        outcome = Outcome(
            result,
            received.topic,
            received.event_id,
            delivery.attempt,
            time.perf_counter() - started,
            subscriber=self.subscription.name,
        )
        report(outcome)
        delivery.ack()
        if self._attempts.is_any:
            self._attempts.forget(delivery)
        return outcome

    def _work(
        self, delivery: Delivery, received: Received, context: MessageContext, event_id: str
    ) -> bool:
        """Run the handler in its transaction; False if another delivery was or is quicker."""
        work: Work | None = None
        if self._transactions is not None:
            known_by = self._handling(delivery, received, event_id)
            work = self._transactions.begin(known_by, once=self.subscription.inbox)
            if work is None:
                return False
            if self._is_taken_over(delivery):
                raise HandlerTimeout("The message was handed back while the inbox waited for it.")
            self._clocks[delivery] = time.monotonic()
        message, decode = received.message, self.subscription.decode
        if decode is not as_received:
            message = decode(message)
        if message_received.receivers:
            self._emit(message_received, context=context)
        self._call(delivery, context, message)
        if not self._decides(delivery, "handler"):
            raise HandlerTimeout("The handler ended after its message was handed back.")
        return work is None or work.commit()

    def _handling(self, delivery: Delivery, received: Received, event_id: str) -> Handling:
        """Return what the inbox knows this event and this subscriber by."""
        app, name = self.subscription.app, self.subscription.name
        if not received.is_named:
            place = (delivery.stream, delivery.sequence, delivery.timestamp)
            return unnamed_handling(app, name, *place)
        return handling(app, name, delivery.subject, event_id)

    def _call(self, delivery: Delivery, context: MessageContext, message: Any) -> None:
        subscription = self.subscription
        handler = subscription.handler
        if subscription.middleware:
            chain = compose(subscription.middleware, lambda inner: handler(message, inner))
            result = chain(context)
        else:
            result = handler(message, context)
        if result is not None and inspect.isawaitable(result):
            self._clocks[delivery] = None
            self._run_async(result, subscription.timeout)

    # --- errors

    def _failed(
        self, delivery: Delivery, received: Received | None, error: BaseException, started: float
    ) -> Outcome:
        result, detail = self._on_error(delivery, received, error)
        shown = _is_worth_a_traceback(error, delivery.attempt, result)
        if not shown:
            detail = _with_place(detail, error)
        seconds = time.perf_counter() - started
        outcome = self._outcome(delivery, received, result, detail, seconds, error)
        report(outcome, with_traceback=shown)
        return outcome

    def _on_error(
        self, delivery: Delivery, received: Received | None, error: BaseException
    ) -> tuple[Result, str]:
        if not self._decides(delivery, "handler"):
            return "timed_out", error_text(error)
        verdict = classify(
            error,
            attempt=self._attempts.of(delivery),
            max_deliver=self.subscription.max_deliver,
            backoff=self.subscription.backoff,
            spared=self._spares(delivery, error),
        )
        if isinstance(verdict, Drop):
            delivery.ack()
            self._attempts.forget(delivery)
            return "discarded", verdict.reason
        if isinstance(verdict, GiveUp):
            failed = verdict.reason == "handler_error"
            reason = self._reason(delivery) if failed else verdict.reason
            return self.give_up(delivery, received, reason, verdict.error)
        if isinstance(error, InboxBusy):
            verdict = RetryLater(max(verdict.delay, self._attempts.pause(delivery)))
        self._retry(delivery, received, verdict, error)
        return "retried", f"{error_text(error)}; again in {verdict.delay:.3g} s"

    def _spares(self, delivery: Delivery, error: BaseException) -> bool:
        """Whether this delivery does not count, since it failed through no fault of the message.

        Before the handler has begun the database is at fault, for as long as it takes; after
        that it may be the handler.
        """
        if isinstance(error, DatabaseError) and self.has_begun(delivery):
            return self._attempts.spare_a_loss(delivery)
        spares = isinstance(error, (DatabaseError, HandlerInterrupted))
        if spares:
            self._attempts.spare(delivery)
        return spares

    def _decides(self, delivery: Delivery, who: str) -> bool:
        """Whether ``who`` decides on the delivery's fate: the first that asks does.

        A handler may come to its end at the very moment its time limit runs out.
        """
        return not delivery.settled and self._deciders.setdefault(delivery, who) == who

    def take_over(self, delivery: Delivery) -> bool:
        """Let the time limit decide, not the handler; False if that one has just ended."""
        return self._decides(delivery, "time limit")

    def is_late(self, delivery: Delivery, started: float, now: float) -> bool:
        """Whether the time limit has run out for a delivery that is being processed.

        :param started: when that began; counts while the handler has not begun.
        """
        since = self._clocks.get(delivery, started)
        return since is not None and now - since > self.subscription.timeout

    def _is_taken_over(self, delivery: Delivery) -> bool:
        return delivery.settled or self._deciders.get(delivery) == "time limit"

    def has_begun(self, delivery: Delivery) -> bool:
        """Whether the handler has begun, after what may have to wait for others."""
        return self._transactions is None or delivery in self._clocks

    def time_out(self, delivery: Delivery, *, begun: bool = True) -> None:
        """Hand a delivery back that was taken over: its handler is still running.

        :param begun: whether it had begun; if not, the delivery does not count.
        """
        subscription, attempt = self.subscription, self._attempts.of(delivery)
        received = try_read(subscription.read, delivery)
        limit: NatsPubsubError = HandlerTimeout(
            f"The handler ran longer than {subscription.timeout:g} s."
        )
        if not begun:
            limit = DatabaseError(f"The inbox could not be asked for {subscription.timeout:g} s.")
            self._attempts.spare(delivery)
        elif attempt >= subscription.max_deliver:
            self.give_up(delivery, received, self._reason(delivery), limit)
            return
        delay = backoff_delay(attempt, subscription.backoff)
        self._retry(delivery, received, RetryLater(delay), limit)

    def _retry(
        self,
        delivery: Delivery,
        received: Received | None,
        verdict: RetryLater,
        error: BaseException,
    ) -> None:
        delivery.nak(verdict.delay)
        if received is not None:
            context = DeliveryContext.of(delivery, received, self.subscription.name)
            self._emit(message_retried, context=context, delay=verdict.delay, error=error)

    def give_up(
        self,
        delivery: Delivery,
        received: Received | None,
        reason: GiveUpReason,
        error: BaseException,
    ) -> tuple[Result, str]:
        """Store the dead letter, then terminate the original; retry it if that fails."""
        text = error_text(error)
        if self.subscription.dead_letter:
            try:
                self._dead_letters.store(delivery, self.subscription, reason, error)
            except Exception as failure:  # noqa: BLE001 - whatever it is, the message is kept
                delay = backoff_delay(delivery.attempt, self.subscription.backoff)
                delivery.nak(max(delay, 1.0))
                return "retried", f"{text}; the dead letter could not be stored: {failure}"
        delivery.term(reason)
        self._attempts.forget(delivery)
        context = (
            None
            if received is None
            else DeliveryContext.of(delivery, received, self.subscription.name)
        )
        self._emit(message_dead_lettered, context=context, reason=reason, error=error)
        return "dead_lettered", f"{reason}: {text}"

    # --- over the limit

    def is_over_limit(self, delivery: Delivery) -> bool:
        """Whether the message was delivered more often than allowed without being refused."""
        most = self.subscription.max_deliver
        return delivery.attempt > most and self._attempts.of(delivery) > most

    def _reason(self, delivery: Delivery) -> GiveUpReason:
        return "max_deliver_exceeded" if self.is_over_limit(delivery) else "handler_error"

    def process_alone(self, delivery: Delivery) -> Outcome:
        """Process a message that is over its limit, while nothing else runs in this process.

        It may be the one that kills processes, or have been in hand when another did. If an
        earlier run alone was not survived, it becomes a dead letter without being run.
        """
        box, subscription = self._dead_letters, self.subscription
        if not subscription.dead_letter:
            return self.process(delivery)
        try:
            died = box.trial_was_started(delivery, subscription)
            if not died:
                box.start_trial(delivery, subscription)
        except NatsPubsubError as error:
            delivery.nak(1.0)
            return self._reported(delivery, "retried", str(error))
        if died:
            outcome = self._reported(delivery, *self._give_up_untried(delivery))
        else:
            # The marker goes before a dead letter comes: it might take the last room there.
            outcome = self.process(delivery, lambda: self._end_trial(delivery))
        if outcome.result != "retried":
            self._end_trial(delivery)
        return outcome

    def _give_up_untried(self, delivery: Delivery) -> tuple[Result, str]:
        error = NeverFinished(
            f"{delivery.attempt} deliveries, and each time the worker died or was stopped; "
            "the last time this message was the only one it had in hand."
        )
        return self.give_up(
            delivery, try_read(self.subscription.read, delivery), "max_deliver_exceeded", error
        )

    def _end_trial(self, delivery: Delivery) -> None:
        with contextlib.suppress(NatsPubsubError):  # a marker left behind does no harm
            self._dead_letters.end_trial(delivery, self.subscription)

    def _reported(self, delivery: Delivery, result: Result, detail: str) -> Outcome:
        """Return the outcome of a delivery that no handler was run for."""
        outcome = self._outcome(delivery, None, result, detail)
        report(outcome)
        return outcome

    def _outcome(
        self,
        delivery: Delivery,
        received: Received | None,
        result: Result,
        detail: str = "",
        seconds: float = 0.0,
        error: BaseException | None = None,
    ) -> Outcome:
        return Outcome(
            result,
            received.topic if received else topic_of(delivery.subject),
            received.event_id if received else f"{delivery.stream}:{delivery.sequence}",
            delivery.attempt,
            seconds,
            detail,
            self.subscription.name,
            error,
        )


def _with_place(detail: str, error: BaseException) -> str:
    """Add to the text of an error, if nobody meant to raise it, where that was."""
    place = "" if isinstance(error, _DELIBERATE) else place_of_error(error)
    return f"{detail} ({place})" if place else detail


def _is_worth_a_traceback(error: BaseException, attempt: int, result: Result) -> bool:
    """Whether it is the first failure of the application's code, or the last."""
    if isinstance(error, _DELIBERATE) or of_application(error) is None:
        return False
    return attempt == 1 or result == "dead_lettered"
