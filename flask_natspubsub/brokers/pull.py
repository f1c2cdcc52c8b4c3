"""A continuous pull on one durable consumer, and the settling of what it delivers.

JetStream sends nothing unasked: each pull asks for a number of messages, lives for
``EXPIRES`` seconds and is kept alive by heartbeats. What this module adds is that a request
is never forgotten: an expired pull is asked again, a silent one is replaced, a deleted
consumer is made anew, and a new connection starts over.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from ..errors import NatsPubsubError
from ..messages.codec import encode_value
from ..text import get_logger
from .base import ConsumerConfig, Consumption, Delivery
from .jetstream import Floor, JetStreamApi
from .wire import DESCRIPTION, STATUS, Route, ack_frame, frame, parse_ack_subject

_log = get_logger("flask_natspubsub.broker")

EXPIRES = 30.0
# A pull can vanish without a word: the server drops one that it has not looked at yet when the
# consumer is deleted. Two missed heartbeats tell, so a silent pull is replaced within 7 seconds.
HEARTBEAT = 2.5
#: Seconds for which acks are collected while they keep coming.
LINGER = 0.001
FLOOR_INTERVAL = 30.0
NANO = 1_000_000_000
PENDING = "Nats-Pending-Messages"


class PullLink(Protocol):
    """What a pull needs of the connection."""

    is_up: bool

    def send(self, frames: Sequence[bytes]) -> None:
        """Write frames of messages to the socket; the loop's thread."""

    def wake(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` soon on the loop; any thread."""

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` on the loop after ``seconds``; the loop's thread."""

    def new_inbox(self) -> str:
        """Return a subject that nobody else listens to."""

    async def route(self, subject: str, handler: Route) -> int:
        """Have what arrives on ``subject`` passed to ``handler``, also after a reconnect."""

    async def unroute(self, key: int, *, flush: bool = False) -> None:
        """Lose interest; with ``flush``, only after what is on its way has arrived."""

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a task on the loop."""

    def run(self, coroutine: Coroutine[Any, Any, None], timeout: float) -> None:
        """Run a coroutine on the loop and wait for it; any other thread."""

    async def reset(self, why: str) -> None:
        """Drop the connection and make a new one."""


class ReplyWriter:
    """Collects acks and their kin from all threads and sends them together.

    The first one after a pause is sent at once; what follows within ``LINGER`` goes together,
    since each wake-up of the loop and each write costs more than handling a message may.
    """

    def __init__(self, link: PullLink) -> None:
        self._link = link
        self._replies: deque[bytes] = deque()
        self._scheduled = False

    def put(self, reply: bytes) -> None:
        """Queue the frame of one reply; never waits."""
        self._replies.append(reply)
        if not self._scheduled:
            self._scheduled = True
            self._link.wake(self._send_on)

    def _send_on(self) -> None:
        self.flush()
        self._link.later(LINGER, self._look_again)

    def _look_again(self) -> None:
        self._scheduled = False  # before the look: a reply put after it schedules itself
        if self._replies and self._link.is_up:
            self._scheduled = True
            self._send_on()

    def flush(self) -> None:
        """Send what is queued; keep it while there is no connection."""
        if not self._link.is_up:
            return
        out = []
        while self._replies:
            out.append(self._replies.popleft())
        if out:
            self._link.send(out)


class NatsDelivery(Delivery):
    """A delivery from JetStream; its reply subject says all about it."""

    __slots__ = ("_reply", "_writer")

    def __init__(
        self,
        subject: str,
        reply: str,
        headers: Mapping[str, str],
        data: bytes,
        writer: ReplyWriter,
    ) -> None:
        self.subject = subject
        self.headers = headers
        self.data = data
        self.settled = False
        self.stream, self.attempt, self.sequence, self.timestamp = parse_ack_subject(reply)
        self._reply = reply
        self._writer = writer

    def _settle(self, payload: bytes) -> None:
        if not self.settled:
            self.settled = True
            self._writer.put(frame(self._reply, payload))

    def ack(self) -> None:  # noqa: D102 - documented in the port, as the rest below
        if not self.settled:
            self.settled = True
            self._writer.put(ack_frame(self._reply))

    def nak(self, delay: float | None = None) -> None:  # noqa: D102
        self._settle(b'-NAK {"delay": %d}' % int(delay * NANO) if delay else b"-NAK")

    def term(self, reason: str = "") -> None:  # noqa: D102
        self._settle(f"+TERM {reason}".rstrip().encode())

    def in_progress(self) -> None:  # noqa: D102
        if not self.settled:
            self._writer.put(frame(self._reply, b"+WPI"))


class Pull(Consumption):
    """See ``Consumption``. All but ``request`` and ``stop`` runs on the loop's thread."""

    def __init__(
        self,
        link: PullLink,
        api: JetStreamApi,
        writer: ReplyWriter,
        config: ConsumerConfig,
        deliver: Callable[[Delivery], None],
    ) -> None:
        self.config = config
        self._link = link
        self._api = api
        self._writer = writer
        self._deliver = deliver
        self._wanted = 0
        self._outstanding = 0
        self._floor = Floor()
        self._inbox = ""
        self._key: int | None = None
        self._heard = time.monotonic()
        self._floor_seen = 0.0
        self._misses = 0
        self._stopped = False
        self._late: list[Delivery] = []
        self._stale = True
        self._opening = asyncio.Lock()
        self._reopening: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{config.stream}.{config.durable}"

    # --- any thread

    def request(self, count: int) -> None:  # noqa: D102 - documented in the port
        self._link.wake(lambda: self._want(count))

    @property
    def is_healthy(self) -> bool:  # noqa: D102
        quiet = time.monotonic() - self._heard
        return self._link.is_up and (self._outstanding == 0 or quiet < 2 * HEARTBEAT + 1)

    def stop(self, timeout: float = 5.0) -> None:  # noqa: D102
        self._link.run(self.close(), timeout)

    # --- the loop's thread

    async def open(self) -> None:
        """Make the consumer and start pulling; the errors of ``Broker.consume``."""
        async with self._opening:
            if not self._stale:
                return
            report = await self._api.ensure_consumer(self.config, after=self._floor)
            self._note_floor(report)
            await self._new_inbox()
        if self._watching is None:
            self._watching = self._link.spawn(self._watch())

    async def close(self) -> None:
        """Stop pulling, and hand back what was on its way."""
        self._stopped = True
        for task in (self._watching, self._reopening):
            if task is not None:
                task.cancel()
        key, self._key = self._key, None
        if key is not None:
            await self._link.unroute(key, flush=True)
        # Only now: the server would give what is handed back to a pull that is still open.
        for delivery in self._late:
            delivery.nak()
        self._writer.flush()

    def on_up(self) -> None:
        """Start over on a new connection: the server has forgotten the old pulls."""
        self._reopen("the connection is new", 0.0)

    def _want(self, count: int) -> None:
        self._wanted += count
        self._pump()

    def _pump(self) -> None:
        if not self._wanted or self._stale or not self._link.is_up or self._stopped:
            return
        if not self._outstanding:
            self._heard = time.monotonic()
        body = {
            "batch": self._wanted,
            "expires": int(EXPIRES * NANO),
            "idle_heartbeat": int(HEARTBEAT * NANO),
        }
        self._outstanding += self._wanted
        self._wanted = 0
        self._link.send([frame(self._next, encode_value(body), self._inbox)])

    def _on_message(
        self, subject: str, reply: str, headers: Mapping[str, str], data: bytes
    ) -> None:
        self._heard = time.monotonic()
        self._misses = 0
        if not data and STATUS in headers and not reply.startswith("$JS.ACK"):
            self._on_status(headers)
            return
        if self._outstanding:
            self._outstanding -= 1
        delivery = NatsDelivery(subject, reply, headers, data, self._writer)
        if self._stopped:
            self._late.append(delivery)
        else:
            self._deliver(delivery)

    def _on_status(self, headers: Mapping[str, str]) -> None:
        status, why = headers[STATUS], headers.get(DESCRIPTION, "")
        if status == "100":
            return
        if status in ("404", "408"):
            unused = min(int(headers.get(PENDING, 0)), self._outstanding)
            self._outstanding -= unused
            self._wanted += unused
            self._pump()
        else:
            self._reopen(why or f"status {status}", 0.25)

    def _reopen(self, why: str, delay: float) -> None:
        self._stale = True
        running = self._reopening is not None and not self._reopening.done()
        if not running and not self._stopped:
            self._reopening = self._link.spawn(self._reopen_until_open(why, delay))

    async def _reopen_until_open(self, why: str, delay: float) -> None:
        while not self._stopped:
            await asyncio.sleep(delay)
            if not self._link.is_up:
                return  # on_up comes here again
            try:
                await self.open()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
                _log.warning("cannot pull for %s yet: %s", self.config.durable, error)
                delay = min(max(delay * 2, 0.25), 5.0)
                continue
            _log.debug("pulling anew for %s: %s", self.config.durable, why)
            return

    async def _new_inbox(self) -> None:
        """Ask on a fresh inbox: without interest in the old one, the server drops its pulls.

        What was on its way to the old one still arrives.
        """
        old, self._key = self._key, None
        if old is not None:
            await self._link.unroute(old, flush=True)
        self._inbox = self._link.new_inbox()
        self._key = await self._link.route(self._inbox, self._on_message)
        self._wanted += self._outstanding
        self._outstanding = 0
        self._heard = time.monotonic()
        self._stale = False
        self._pump()

    async def _watch(self) -> None:
        while not self._stopped:
            await asyncio.sleep(HEARTBEAT / 2)
            try:
                await self._look()
            except Exception:  # noqa: BLE001 - nobody else would notice a silent pull
                _log.exception("looking after the pull for %s failed", self.config.durable)

    async def _look(self) -> None:
        if not self._link.is_up:
            return
        silent = time.monotonic() - self._heard > 2 * HEARTBEAT
        if self._outstanding and silent:
            await self._on_silence()
        elif time.monotonic() - self._floor_seen > FLOOR_INTERVAL:
            await self._refresh_floor()

    async def _on_silence(self) -> None:
        self._misses += 1
        self._heard = time.monotonic()
        _log.warning("the pull for %s fell silent; making a new one", self.config.durable)
        if self._misses > 1:
            self._misses = 0
            await self._link.reset("pulls are silent")
        else:
            self._reopen("it was silent", 0.0)

    async def _refresh_floor(self) -> None:
        """Keep the ack floor, from which a consumer that somebody deletes is made anew."""
        try:
            report = await self._api.consumer(self.config.stream, self.config.durable)
        except NatsPubsubError:
            return
        if report is None:
            self._reopen("the consumer is gone", 0.0)
        else:
            self._note_floor(report)

    def _note_floor(self, report: Mapping[str, Any]) -> None:
        self._floor_seen = time.monotonic()
        sequence = int(report.get("ack_floor", {}).get("stream_seq", 0))
        self._floor = Floor(report.get("stream_created", self._floor.stream_created), sequence)
