"""What happens to one delivery, from top to bottom.

decode -> context and trace -> app context -> middleware -> handler -> ack; on an error:
retry later, drop, or dead letter first and then terminate. Everything about a message's fate
is decided here; threads, pulls and time limits are the worker's.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import inspect
import logging
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from ..brokers.base import Delivery
from ..errors import DecodingError, NatsPubsubError
from ..messages.envelope import Received, read
from ..messages.lineage import Lineage, within
from ..messages.subjects import topic_of
from ..signals import (
    message_dead_lettered,
    message_handled,
    message_received,
    message_retried,
)
from .context import MessageContext, handling
from .deadletters import REPLAY_FOR, DeadLetterBox
from .middleware import compose
from .retry import Drop, GiveUp, GiveUpReason, RetryLater, backoff_delay, classify, error_text
from .subscription import Subscription

_log = logging.getLogger("flask_natspubsub.worker")

Result = Literal["handled", "retried", "discarded", "dead_lettered", "skipped", "timed_out"]
#: Sends a signal of this package for the application.
Emit = Callable[..., None]


class HandlerTimeout(NatsPubsubError):
    """A handler ran longer than its time limit; the message is delivered again."""

    code = "handler-timeout"


class NeverFinished(NatsPubsubError):
    """A message was delivered too often without any handler ending: the process died."""

    code = "never-finished"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a delivery; one log line's worth.

    :param seconds: from receiving the delivery to its end.
    :param detail: the error or reason, in one line; empty when handled.
    """

    result: Result
    topic: str
    event_id: str
    attempt: int
    seconds: float
    detail: str = ""


class Processor:
    """Processes the deliveries of one subscription; used by many threads at once.

    :param app_context: makes the application context a message is handled in.
    :param emit: sends a signal.
    :param run_async: runs the awaitable of an ``async def`` handler and waits for it at most
        so many seconds.
    """

    def __init__(
        self,
        subscription: Subscription,
        dead_letters: DeadLetterBox,
        app_context: Callable[[], AbstractContextManager[object]],
        emit: Emit,
        run_async: Callable[[Any, float], Any],
    ) -> None:
        self.subscription = subscription
        self._dead_letters = dead_letters
        self._app_context = app_context
        self._emit = emit
        self._run_async = run_async

    # --- the straight path

    def process(self, delivery: Delivery) -> Outcome:
        """Handle one delivery and settle it. Never raises."""
        started = time.perf_counter()
        received: Received | None = None
        try:
            received = read(
                delivery.data,
                delivery.headers,
                delivery.subject,
                delivery.stream,
                delivery.sequence,
            )
            if delivery.headers.get(REPLAY_FOR, self.subscription.name) != self.subscription.name:
                delivery.ack()
                result: Result = "skipped"
            else:
                result = self._handle(delivery, received, started)
            detail = ""
        except BaseException as error:  # noqa: BLE001 - sys.exit() in a handler is a failure too
            result, detail = self._on_error(delivery, received, error)
        return Outcome(
            result,
            received.topic if received else topic_of(delivery.subject),
            received.event_id if received else f"{delivery.stream}:{delivery.sequence}",
            delivery.attempt,
            time.perf_counter() - started,
            detail,
        )

    def _handle(self, delivery: Delivery, received: Received, started: float) -> Result:
        context = self._context(delivery, received)
        lineage = Lineage(
            context.trace_id,
            context.correlation_id,
            context.event_id,
            delivery.headers.get("traceparent"),
        )
        with within(lineage), handling(context), self._app_context():
            self._emit(message_received, context=context)
            self._call(context, self.subscription.decode(received.message))
            if delivery.settled:
                raise HandlerTimeout("The handler ended after its time limit.")
        delivery.ack()
        self._emit(message_handled, context=context, seconds=time.perf_counter() - started)
        return "handled"

    def _call(self, context: MessageContext, message: Any) -> None:
        subscription = self.subscription
        handler = subscription.handler
        chain = compose(subscription.middleware, lambda inner: handler(message, inner))
        result = chain(context)
        if inspect.isawaitable(result):
            self._run_async(result, subscription.timeout)

    def _context(self, delivery: Delivery, received: Received) -> MessageContext:
        published_at = dt.datetime.fromtimestamp(delivery.timestamp, dt.UTC)
        return MessageContext(
            event_id=received.event_id,
            topic=received.topic,
            subject=delivery.subject,
            stream=delivery.stream,
            sequence=delivery.sequence,
            trace_id=received.trace_id,
            correlation_id=received.correlation_id,
            causation_id=received.causation_id,
            producer=received.producer,
            occurred_at=received.occurred_at or published_at,
            published_at=published_at,
            attempt=delivery.attempt,
            headers=delivery.headers,
            raw=delivery.data,
            envelope=received.envelope,
            subscriber=self.subscription.name,
        )

    # --- errors

    def _on_error(
        self, delivery: Delivery, received: Received | None, error: BaseException
    ) -> tuple[Result, str]:
        if delivery.settled:
            return "timed_out", error_text(error)
        verdict = classify(
            error,
            attempt=delivery.attempt,
            max_deliver=self.subscription.max_deliver,
            backoff=self.subscription.backoff,
            random=random.random,
        )
        if isinstance(verdict, Drop):
            delivery.ack()
            return "discarded", verdict.reason
        if not isinstance(error, DecodingError):
            _log.debug("handler %s failed", self.subscription.name, exc_info=error)
        if isinstance(verdict, GiveUp):
            over = verdict.reason == "handler_error" and self.is_over_limit(delivery)
            reason = "max_deliver_exceeded" if over else verdict.reason
            return self.give_up(delivery, received, reason, verdict.error)
        self._retry(delivery, received, verdict, error)
        return "retried", f"{error_text(error)}; again in {verdict.delay:.3g} s"

    def time_out(self, delivery: Delivery) -> None:
        """Hand a delivery back whose handler is still running after its time limit."""
        subscription = self.subscription
        if delivery.attempt >= subscription.max_deliver:
            limit = HandlerTimeout(f"The handler ran longer than {subscription.timeout:g} s.")
            self.give_up(delivery, None, "handler_error", limit)
        else:
            delivery.nak(backoff_delay(delivery.attempt, subscription.backoff, random.random))

    def _retry(
        self,
        delivery: Delivery,
        received: Received | None,
        verdict: RetryLater,
        error: BaseException,
    ) -> None:
        delivery.nak(verdict.delay)
        if received is not None:
            context = self._context(delivery, received)
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
            except NatsPubsubError as failure:
                delay = backoff_delay(delivery.attempt, self.subscription.backoff, random.random)
                delivery.nak(max(delay, 1.0))
                return "retried", f"{text}; the dead letter could not be stored: {failure}"
        delivery.term(reason)
        context = None if received is None else self._context(delivery, received)
        self._emit(message_dead_lettered, context=context, reason=reason, error=error)
        return "dead_lettered", f"{reason}: {text}"

    # --- over the limit

    def is_over_limit(self, delivery: Delivery) -> bool:
        """Whether the message was delivered more often than allowed without being refused."""
        return delivery.attempt > self.subscription.max_deliver

    def process_alone(self, delivery: Delivery) -> Outcome:
        """Process a message that is over its limit, while nothing else runs in this process.

        It may be the one that kills processes, or have been in hand when another did. If an
        earlier run alone was not survived, it becomes a dead letter without being run.
        """
        box, subscription = self._dead_letters, self.subscription
        if not subscription.dead_letter:
            return self.process(delivery)
        try:
            survived = not box.trial_was_started(delivery, subscription)
            if survived:
                box.start_trial(delivery, subscription)
        except NatsPubsubError as error:
            delivery.nak(1.0)
            return self._outcome(delivery, "retried", str(error))
        if survived:
            outcome = self.process(delivery)
        else:
            died = NeverFinished(
                f"{delivery.attempt} deliveries, and each time the worker died or was stopped; "
                "the last time this message was the only one it had in hand."
            )
            outcome = self._outcome(
                delivery, *self.give_up(delivery, None, "max_deliver_exceeded", died)
            )
        if outcome.result != "retried":
            with contextlib.suppress(NatsPubsubError):  # a marker left behind does no harm
                box.end_trial(delivery, subscription)
        return outcome

    def _outcome(self, delivery: Delivery, result: Result, detail: str) -> Outcome:
        return Outcome(
            result,
            topic_of(delivery.subject),
            f"{delivery.stream}:{delivery.sequence}",
            delivery.attempt,
            0.0,
            detail,
        )
