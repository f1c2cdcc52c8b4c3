"""An app with subscribers on a real server, and another client beside it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import nats
from nats.aio.client import Client

from flask_natspubsub import MessageContext, NatsPubsub
from flask_natspubsub.brokers.base import ConsumerInfo
from flask_natspubsub.deadletters.reader import DeadLetterRecord
from flask_natspubsub.worker.worker import Worker
from tests.support.waiting import eventually

TIMEOUT = 20.0


def fail_until(attempt: int, error: type[Exception] = ValueError) -> Callable[..., None]:
    """Make a ``then`` that fails before delivery number ``attempt``."""

    def then(message: Any, context: MessageContext) -> None:
        if context.attempt < attempt:
            raise error("not yet")

    return then


class Recorder:
    """A handler that remembers its calls and then does ``then``."""

    def __init__(self, then: Callable[[Any, MessageContext], Any] | None = None) -> None:
        self.calls: list[tuple[Any, MessageContext]] = []
        self._then = then

    def __call__(self, message: Any, context: MessageContext) -> None:
        self.calls.append((message, context))
        if self._then is not None:
            self._then(message, context)

    @property
    def messages(self) -> list[Any]:
        return [message for message, _ in self.calls]

    @property
    def contexts(self) -> list[MessageContext]:
        return [context for _, context in self.calls]

    @property
    def numbers(self) -> list[int]:
        """The ``n`` of each message, in order of the calls."""
        return [message["n"] for message in self.messages]

    def wait(self, count: int, timeout: float = TIMEOUT) -> None:
        """Wait for ``count`` calls in all, and see that there are not more."""
        eventually(
            lambda: len(self.calls) >= count,
            timeout,
            f"{count} calls expected within {timeout} s",
        )
        assert len(self.calls) == count

    def wait_for_numbers(self, numbers: Sequence[int] | range, timeout: float = TIMEOUT) -> None:
        """Wait until each of ``numbers`` was seen, however often."""
        wanted = set(numbers)
        eventually(
            lambda: wanted <= set(self.numbers),
            timeout,
            f"not all of {len(wanted)} messages were seen within {timeout} s",
        )


class Shop:
    """An app, its workers and its dead letters; workers are stopped when it is left."""

    def __init__(self, pubsub: NatsPubsub) -> None:
        self.pubsub = pubsub
        self.state = pubsub.state()
        self.app = self.state.app
        self.settings = self.state.settings
        #: Set at the end, for handlers that hang until then.
        self.released = threading.Event()
        self._workers: list[Worker] = []

    def __enter__(self) -> Shop:
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        for worker in self._workers:
            worker.stop()

    def subscriber(self, *topics: str, **options: Any) -> Callable[..., Any]:
        return self.pubsub.subscriber(*topics, **options)

    def record(
        self, *topics: str, then: Callable[[Any, MessageContext], Any] | None = None, **options: Any
    ) -> Recorder:
        """Subscribe a recorder; its name defaults to ``mailer``."""
        recorder = Recorder(then)
        self.pubsub.registry.add(recorder, *topics, **{"name": "mailer", **options})
        return recorder

    def work(self, concurrency: int | None = None, only: list[str] | None = None) -> Worker:
        """Start a worker."""
        worker = self.pubsub.run_worker(only, concurrency=concurrency)
        self._workers.append(worker)
        return worker

    def publish(self, topic: str, *numbers: int) -> None:
        """Publish ``{"n": number}`` for each."""
        self.pubsub.publish_many([(topic, {"n": number}) for number in numbers])

    def hang(self, *_: object) -> None:
        """What a handler calls to hang until the end of the test."""
        self.released.wait(60)

    # --- the server's view

    def consumer(self, name: str = "mailer") -> ConsumerInfo | None:
        durable = f"{self.settings.app_name}-{name}"
        return self.state.broker().consumer_info(self.settings.stream, durable)

    def is_settled(self, name: str = "mailer") -> bool:
        """Whether the server has nothing left for a subscriber, and waits for no ack."""
        info = self.consumer(name)
        return info is not None and not info.pending and not info.ack_pending

    def wait_until_settled(self, *names: str, timeout: float = TIMEOUT) -> None:
        for name in names or ("mailer",):
            eventually(lambda name=name: self.is_settled(name), timeout, f"{name} is not settled")

    @property
    def dead_letters(self) -> list[DeadLetterRecord]:
        """Also those that others may have put among the events."""
        return list(self.pubsub.dead_letters.list(peers=True))

    def wait_for_dead_letters(self, count: int, timeout: float = TIMEOUT) -> list[DeadLetterRecord]:
        found = eventually(
            lambda: len(letters := self.dead_letters) >= count and letters,
            timeout,
            f"{count} dead letters expected within {timeout} s",
            interval=0.05,
        )
        assert len(found) == count
        return found

    # --- another client

    def by_hand(self, talk: Callable[[Client], Awaitable[Any]]) -> Any:
        """Let another client, plain nats-py, talk to the server."""
        return by_hand(self.settings.urls[0], talk)

    def publish_by_hand(self, *messages: tuple[str, bytes, dict[str, str] | None]) -> None:
        """Publish (topic, body, headers), or an absolute subject if it begins with a dot."""

        async def talk(client: Client) -> None:
            stream = client.jetstream()
            for topic, body, headers in messages:
                subject = topic[1:] if topic.startswith(".") else self.subject(topic)
                await stream.publish(subject, body, headers=headers)

        self.by_hand(talk)

    def subject(self, topic: str, app_name: str | None = None) -> str:
        return f"{self.settings.env}.{app_name or self.settings.app_name}.{topic}"


def by_hand(url: str, talk: Callable[[Client], Awaitable[Any]]) -> Any:
    """Let plain nats-py talk to a server."""

    async def run() -> Any:
        client = await nats.connect(url)
        try:
            return await talk(client)
        finally:
            with contextlib.suppress(Exception):
                await client.close()

    return asyncio.run(run())
