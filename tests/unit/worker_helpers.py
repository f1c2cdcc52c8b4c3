"""Stand-ins for what is around the processor and the consumer: delivery, dead letters, broker."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from flask_natspubsub import message_handled, message_received
from flask_natspubsub.brokers.base import Consumption, Delivery
from flask_natspubsub.config.settings import Settings
from flask_natspubsub.errors import PublishError
from flask_natspubsub.subscribing.registry import Registry
from flask_natspubsub.worker.processor import Processor

SETTINGS = Settings(urls=("memory://",), env="test", app_name="shop", backoff=(1.0, 10.0))


def envelope(message: Any = None, **more: Any) -> bytes:
    """The bytes of a message with event id ``e1``."""
    whole = {"event_id": "e1", "topic": "order.created", "message": message or {"id": 1}, **more}
    return json.dumps(whole).encode()


class FakeDelivery(Delivery):
    """Remembers in ``calls`` what it was told; ``fate`` is what settled it."""

    __slots__ = ("calls",)

    def __init__(
        self,
        data: bytes | None = None,
        *,
        attempt: int = 1,
        headers: dict[str, str] | None = None,
        sequence: int = 7,
        subject: str = "test.shop.order.created",
    ) -> None:
        self.data = envelope() if data is None else data
        self.headers = headers or {}
        self.subject = subject
        self.stream = "test-events-stream"
        self.sequence = sequence
        self.settled = False
        self.attempt = attempt
        self.timestamp = 1_750_000_000.0
        self.calls: list[tuple[str, Any]] = []

    @property
    def fate(self) -> tuple[str, Any] | None:
        fates = [call for call in self.calls if call[0] != "in_progress"]
        assert len(fates) < 2
        return fates[0] if fates else None

    def _settle(self, how: str, value: Any = None) -> None:
        if not self.settled:
            self.settled = True
            self.calls.append((how, value))

    def ack(self) -> None:
        self._settle("ack")

    def nak(self, delay: float | None = None) -> None:
        self._settle("nak", delay)

    def term(self, reason: str = "") -> None:
        self._settle("term", reason)

    def in_progress(self) -> None:
        self.calls.append(("in_progress", None))


class FakeBox:
    """Keeps dead letters in ``stored`` as (delivery, reason, error), unless ``error`` is set."""

    def __init__(self) -> None:
        self.stored: list[tuple[Delivery, str, BaseException]] = []
        self.fates_when_stored: list[Any] = []
        self.trials: set[int] = set()
        self.trials_when_stored: set[int] | None = None
        self.error: Exception | None = None

    def store(self, delivery: Any, subscription: Any, reason: str, error: BaseException) -> None:
        if self.error is not None:
            raise self.error
        self.stored.append((delivery, reason, error))
        self.fates_when_stored.append(delivery.fate)
        self.trials_when_stored = set(self.trials)

    def trial_was_started(self, delivery: Delivery, subscription: Any) -> bool:
        return delivery.sequence in self.trials

    def start_trial(self, delivery: Delivery, subscription: Any) -> None:
        if self.error is not None:
            raise self.error
        self.trials.add(delivery.sequence)

    def end_trial(self, delivery: Delivery, subscription: Any) -> None:
        self.trials.discard(delivery.sequence)

    def fail(self) -> None:
        self.error = PublishError("The stream is full.")


class Rig:
    """A processor with everything around it written down in ``events``."""

    def __init__(self, handler: Callable[..., Any], **options: Any) -> None:
        registry = Registry()
        registry.add(handler, "order.created", name="mailer", **options)
        (self.subscription,) = registry.resolve(SETTINGS)
        self.box = FakeBox()
        self.events: list[Any] = []
        self.signals: list[tuple[str, dict[str, Any]]] = []
        self.teardown_error: Exception | None = None
        # Signals that nobody receives are not sent.
        self._receiver = lambda sender, **arguments: None
        for signal in (message_received, message_handled):
            signal.connect(self._receiver)
        self.processor = Processor(
            self.subscription,
            self.box,  # type: ignore[arg-type]  # stands in for it
            self._app_context,
            self._emit,
            self._run_async,
        )

    @contextmanager
    def _app_context(self) -> Any:
        self.events.append("enter")
        try:
            yield
        finally:
            self.events.append("leave")
            if self.teardown_error is not None:
                raise self.teardown_error

    def _emit(self, signal: Any, **arguments: Any) -> None:
        self.signals.append((signal.name, arguments))

    def _run_async(self, awaitable: Any, timeout: float) -> Any:
        self.events.append(("async", timeout))
        try:
            awaitable.send(None)
        except StopIteration as result:
            return result.value
        raise AssertionError("the awaitable did not end at once")

    @property
    def signal_names(self) -> list[str]:
        return [name for name, _ in self.signals]


class FakeConsumption(Consumption):
    """A pull that remembers its requests."""

    def __init__(self, log: list[str]) -> None:
        self.requests: list[int] = []
        self.stop_error: Exception | None = None
        self._log = log

    def request(self, count: int) -> None:
        assert count > 0
        self.requests.append(count)

    def stop(self, timeout: float = 5.0) -> None:
        self._log.append("stop")
        if self.stop_error is not None:
            raise self.stop_error

    @property
    def is_healthy(self) -> bool:
        return True


class FakeBroker:
    """Gives out one pull and keeps what is to be called with deliveries."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.consumption = FakeConsumption(self.log)
        self.deliver: Callable[[Delivery], None] = lambda delivery: None
        self.while_opening: Callable[[], None] = lambda: None
        self.info: Any = None

    def consume(self, config: Any, deliver: Callable[[Delivery], None]) -> Consumption:
        self.deliver = deliver
        self.while_opening()
        return self.consumption

    def consumer_info(self, stream: str, durable: str) -> Any:
        return self.info
