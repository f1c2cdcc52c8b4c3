"""JetStream behind the port: a thread, a link, and what is sent and pulled over it.

A ``Session`` is what one process holds. The broker makes it on the first call, makes a new
one in a forked child or when its thread has died, and never shares one between processes.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ...config.settings import Settings
from ...errors import NotConnected
from ...messages.message import Message, StoredMessage
from ...text import get_logger
from ..base import (
    Broker,
    Change,
    ConsumerConfig,
    ConsumerInfo,
    Consumption,
    CoreSubscription,
    Delivery,
    StreamConfig,
    StreamInfo,
    Ticket,
)
from ..loop import BackgroundLoop
from ..topology import presence_subject
from ..wire import frame
from . import missed
from .connection import Dial, LinkOwner
from .consumer_api import consumer_info
from .link import DEFAULT_MAX_PAYLOAD, Link
from .presence import Presence
from .publish_window import PublishWindow
from .pull import Pull
from .settling import ReplyWriter
from .stream_api import JetStreamApi, stream_info

_log = get_logger("flask_natspubsub.broker")

T = TypeVar("T")

#: Seconds for one request to the API, and for one question of those that are repeated.
API_TIMEOUT = 5.0
ASK_AGAIN = 1.0
#: Seconds for a subscription: longer than the link's own deadline for it, which says more.
LISTEN_TIMEOUT = 6.0
#: Seconds that a broker may take to send what waits when the interpreter exits.
EXIT_TIMEOUT = 2.0
#: The number of servers from which a cluster can keep a stream more than once.
WORTH_REPLICAS = 3

#: The brokers of this process: abandoned in a forked child, closed when the interpreter exits.
_brokers: weakref.WeakSet[JetStreamBroker] = weakref.WeakSet()
#: What a forked child inherited and must not touch: closing it, or letting it be collected,
#: could disturb the parent, whose sockets and selector it shares.
_abandoned: list[object] = []


class Session(LinkOwner):
    """The thread and the link of one process, and what is sent and pulled over it."""

    def __init__(
        self,
        settings: Settings,
        dial: Dial,
        wanted: Sequence[StreamConfig],
        before_replies: Callable[[], None],
    ) -> None:
        self.loop = BackgroundLoop(f"natspubsub-{settings.app_name}")
        self.link = Link(settings, self.loop, dial, self)
        self.api = JetStreamApi(self._request, settings.api_prefix)
        self.writer = ReplyWriter(self.link, before_replies)
        reply_subject = self.link.new_reply_subject()
        self.window = PublishWindow(self.link, reply_subject, settings)
        self.pulls: set[Pull] = set()
        self.presence = Presence(self.link, presence_subject(settings), lambda: list(self.pulls))
        self.wanted = wanted
        self._warned = False
        # Not waited for: a greenlet that waits while it holds the broker's lock, which may be
        # older than gevent's patches, would hang all others. What comes later runs after it.
        asyncio.run_coroutine_threadsafe(self._start(reply_subject), self.loop.loop)

    async def _start(self, reply_subject: str) -> None:
        await self.link.route(f"{reply_subject}.*", self.window.on_reply)
        self.link.spawn(self._keep_up())

    async def _keep_up(self) -> None:
        try:
            await self.link.keep_up()
        finally:
            # Also when the thread dies: whoever waits for an answer hears at once.
            self.window.close()

    async def _request(self, subject: str, payload: bytes) -> bytes:
        def ask() -> Coroutine[Any, Any, bytes]:
            return self.link.request(subject, payload, API_TIMEOUT)

        return await (first_answer(ask) if ".INFO." in subject else ask())

    async def set_up(self) -> None:
        """Look after the wanted streams."""
        if self.wanted:
            await self.api.setup(self.wanted, dry_run=False)
            await self._look_at_replicas()

    async def _look_at_replicas(self) -> None:
        """Warn, once, of a stream that only one server of a cluster has."""
        size, name = self.link.cluster_size, self.wanted[0].name
        if size < WORTH_REPLICAS or self._warned:
            return
        report = await self.api.stream(name)
        if report is not None and stream_info(report).config.replicas == 1:
            self._warned = True
            _log.warning(
                "the stream %r has 1 replica in a cluster of %d: if its server is lost, so are "
                "its messages. Set replicas to 3 in NATSPUBSUB_STREAM_CONFIG before it is made, "
                "or now: nats stream edit %s --replicas 3",
                name,
                size,
                name,
            )

    def catch_up(self, pull: Pull, filters: tuple[str, ...], after: int) -> None:
        """Have delivered what the consumer of ``pull`` has passed over; see ``missed``.

        :param filters: what it did not get behind the message ``after``; none to go on with
            what another process had begun.
        """

        def companion(config: ConsumerConfig, deliver: Callable[[Delivery], None]) -> Pull:
            return Pull(self, config, deliver, is_companion=True)

        if filters:
            task = missed.catch_up(self.api, pull, filters, after, companion)
        else:
            task = missed.go_on(self.api, pull, companion)
        self.link.spawn(task)

    def on_up(self) -> None:  # noqa: D102 - documented in LinkOwner, as the next two
        self.writer.flush()
        self.window.on_up()
        for pull in list(self.pulls):
            pull.on_up()

    def on_denied(self, subject: str) -> None:  # noqa: D102
        self.window.on_denied(subject)

    def on_down(self) -> None:  # noqa: D102
        self.window.on_down()
        if self.link.refused:
            self.window.fail_all(NotConnected(self.link.refused))

    def close(self, timeout: float) -> None:
        """Send what waits, within ``timeout`` seconds, and end the thread; any other thread."""
        if self.loop.is_alive:
            with contextlib.suppress(Exception):  # whatever state it is in, it ends here
                self.loop.call(self._close(timeout), timeout + 1)
        self.loop.stop()
        self.window.close()

    async def _close(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for pull in list(self.pulls):
            await pull.close()
        # Polled, at the end only: an event would cost something at each publish.
        while (  # noqa: ASYNC110
            not self.link.has_failed and self.window.unsettled and time.monotonic() < deadline
        ):
            await asyncio.sleep(0.01)
        if left := self.window.unsettled:
            _log.warning("closed with %d messages not acknowledged: they may not be stored", left)
        self.writer.flush()
        await self.link.close(max(0.1, deadline - time.monotonic()))


async def first_answer(
    ask: Callable[[], Coroutine[Any, Any, bytes]],
    again: float = ASK_AGAIN,
    timeout: float = API_TIMEOUT,
) -> bytes:
    """Ask again until one of the questions is answered or fails.

    While a stream or a consumer of a cluster has no leader, what is asked of it is lost.

    :param again: seconds between two questions, of which the last is asked before ``timeout``.
    """
    asked: list[asyncio.Task[bytes]] = []
    try:
        while True:
            asked.append(asyncio.create_task(ask()))
            more = len(asked) < timeout / again
            done, _ = await asyncio.wait(
                asked, timeout=again if more else None, return_when=asyncio.FIRST_COMPLETED
            )
            if done:
                return done.pop().result()
    finally:
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


class _CoreHandle(CoreSubscription):
    def __init__(self, session: Session, key: int) -> None:
        self._session = session
        self._key = key

    def stop(self) -> None:
        if self._session.loop.is_alive:
            self._session.link.run(self._session.link.unroute(self._key), LISTEN_TIMEOUT)


class JetStreamBroker(Broker):
    """See ``Broker``; ``dial`` makes the connections."""

    def __init__(self, settings: Settings, dial: Dial) -> None:
        self._settings = settings
        self._dial = dial
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._wanted: Sequence[StreamConfig] = ()
        self._before_replies: Callable[[], None] = lambda: None
        self._pid = os.getpid()
        self._closed = False
        _brokers.add(self)

    def _live(self) -> Session:
        session = self._session
        if session is not None and self._pid == os.getpid() and session.loop.is_alive:
            return session
        if self._pid != os.getpid():
            self.abandon()
        with self._lock:
            if self._closed:
                raise NotConnected("The broker is closed.", "Do not use it after shutdown().")
            if self._session is not None and not self._session.loop.is_alive:
                self._session.close(0)
                self._session = None
            if self._session is None:
                self._session = Session(
                    self._settings, self._dial, self._wanted, lambda: self._before_replies()
                )
            return self._session

    def abandon(self) -> None:
        """Forget what was inherited over a fork, without touching the parent's socket."""
        if self._session is not None:
            _abandoned.append(self._session)
        self._session = None
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def _ask(self, make: Callable[[JetStreamApi], Coroutine[Any, Any, T]], timeout: float) -> T:
        session = self._live()
        return session.link.run(make(session.api), timeout)

    @property
    def is_connected(self) -> bool:  # noqa: D102 - documented in the port, as all below
        session = self._session
        alive = session is not None and self._pid == os.getpid() and session.loop.is_alive
        return alive and session is not None and session.link.is_up

    @property
    def max_payload(self) -> int:  # noqa: D102
        return self._session.link.max_payload if self._session else DEFAULT_MAX_PAYLOAD

    @property
    def server_version(self) -> str:  # noqa: D102
        return self._session.link.server_version if self._session else ""

    def load(self) -> dict[str, int]:  # noqa: D102
        session = self._session
        if session is None or self._pid != os.getpid():
            return {}
        return session.window.load() | {"pulls": len(session.pulls)}

    def connect(self, timeout: float) -> None:  # noqa: D102
        session = self._live()
        session.link.run(session.link.wait_up(timeout), timeout + 1)

    def close(self, timeout: float = 5.0) -> None:  # noqa: D102
        with self._lock:
            self._closed = True
            session, self._session = self._session, None
        if session is not None and self._pid == os.getpid():
            session.close(timeout)

    # --- publishing

    @property
    def is_own_thread(self) -> bool:  # noqa: D102
        session = self._session
        return session is not None and session.loop.is_current

    def submit(self, messages: Sequence[Message], timeout: float) -> Ticket:  # noqa: D102
        session = self._session
        if session is None or session.loop.has_ended or self._pid != os.getpid():
            session = self._live()
        return session.window.submit(messages, timeout)

    def send(self, subject: str, payload: bytes) -> None:  # noqa: D102
        with contextlib.suppress(NotConnected):
            link = self._live().link
            link.wake(lambda: link.send([frame(subject, payload)]))

    # --- consuming

    def consume(  # noqa: D102
        self, config: ConsumerConfig, deliver: Callable[[Delivery], None]
    ) -> Consumption:
        session = self._live()
        pull = Pull(session, config, deliver)
        try:
            session.link.run(self._open(session, pull), API_TIMEOUT * 3)
        except BaseException:
            session.pulls.discard(pull)
            raise
        return pull

    async def _open(self, session: Session, pull: Pull) -> None:
        """Open now if there is a server; else the link opens it when there is one."""
        with contextlib.suppress(NotConnected):
            await session.link.wait_up(self._settings.connect_timeout)
            await session.presence.listen()
            await pull.open()

    def add_consumer(self, config: ConsumerConfig) -> None:  # noqa: D102
        self._ask(lambda api: api.ensure_consumer(config), API_TIMEOUT * 3)

    def before_replies(self, callback: Callable[[], None]) -> None:  # noqa: D102
        self._before_replies = callback

    def listen(  # noqa: D102
        self, subject: str, callback: Callable[[Message], None]
    ) -> CoreSubscription:
        session = self._live()

        def route(at: str, reply: str, headers: Mapping[str, str], data: bytes) -> None:
            callback(Message(at, data, headers))

        return _CoreHandle(
            session, session.link.run(session.link.route(subject, route), LISTEN_TIMEOUT)
        )

    # --- looking after streams

    def want(self, streams: Sequence[StreamConfig]) -> None:  # noqa: D102
        self._wanted = tuple(streams)
        session = self._session
        if session is not None and self.is_connected:
            session.wanted = self._wanted
            session.link.run(session.link.set_up(), API_TIMEOUT * 3)
        elif session is not None:
            session.wanted = self._wanted

    def setup(  # noqa: D102
        self, streams: Sequence[StreamConfig], *, dry_run: bool = False
    ) -> list[Change]:
        return self._ask(lambda api: api.setup(streams, dry_run=dry_run), API_TIMEOUT * 6)

    def stream_info(self, stream: str) -> StreamInfo | None:  # noqa: D102
        report = self._ask(lambda api: api.stream(stream), API_TIMEOUT + 1)
        return stream_info(report) if report else None

    def consumer_info(self, stream: str, durable: str) -> ConsumerInfo | None:  # noqa: D102
        report = self._ask(lambda api: api.consumer(stream, durable), API_TIMEOUT + 1)
        return consumer_info(report) if report else None

    def place(self, config: ConsumerConfig) -> ConsumerConfig:  # noqa: D102
        return self._ask(lambda api: api.place(config), API_TIMEOUT * 3)

    def consumers(self, stream: str) -> list[ConsumerInfo]:  # noqa: D102
        reports = self._ask(lambda api: api.consumers(stream), API_TIMEOUT * 6)
        return [consumer_info(report) for report in reports]

    def delete_consumer(self, stream: str, durable: str) -> bool:  # noqa: D102
        return self._ask(lambda api: api.delete_consumer(stream, durable), API_TIMEOUT + 1)

    def get_message(self, stream: str, sequence: int) -> StoredMessage | None:  # noqa: D102
        return self._ask(lambda api: api.message(stream, {"seq": sequence}), API_TIMEOUT + 1)

    def get_messages(  # noqa: D102
        self, places: Sequence[tuple[str, int]], timeout: float
    ) -> list[StoredMessage | None]:
        return self._ask(lambda api: api.messages(places), timeout)

    def messages(  # noqa: D102
        self, stream: str, subject: str = ">", *, after: int = 0
    ) -> Iterator[StoredMessage]:
        while True:
            query = {"seq": after + 1, "next_by_subj": subject}
            found = self._ask(lambda api, q=query: api.message(stream, q), API_TIMEOUT + 1)  # type: ignore[misc]
            if found is None:
                return
            yield found
            after = found.sequence

    def last_message(self, stream: str, subject: str) -> StoredMessage | None:  # noqa: D102
        query = {"last_by_subj": subject}
        return self._ask(lambda api: api.message(stream, query), API_TIMEOUT + 1)

    def delete_message(self, stream: str, sequence: int) -> bool:  # noqa: D102
        return self._ask(lambda api: api.delete_message(stream, sequence), API_TIMEOUT + 1)

    def now(self) -> float:  # noqa: D102
        return time.time()


def _after_fork_in_child() -> None:
    for broker in list(_brokers):
        broker.abandon()


def _at_exit() -> None:
    for broker in list(_brokers):
        broker.close(timeout=EXIT_TIMEOUT)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
