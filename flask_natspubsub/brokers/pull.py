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
from .agreement import Needs
from .base import ConsumerConfig, Consumption, Delivery
from .consumers import ConsumerApi, Floor, PullLimits, Standing, needs_of
from .missed import Puller
from .presence import Presence
from .strangers import ASK_AGAIN, Strangers
from .wire import DESCRIPTION, STATUS, Route, ack_frame, frame, parse_ack_subject

_log = get_logger("flask_natspubsub.broker")

EXPIRES = 30.0
# A pull can vanish without a word: the server drops one that it has not looked at yet when the
# consumer is deleted. Two missed heartbeats tell, so a silent pull is replaced within 7 seconds.
HEARTBEAT = 2.5
#: Seconds for which acks are collected while they keep coming.
LINGER = 0.001
#: So long if there were at least so many the last time: then each write has more to share.
LINGER_BUSY, BUSY = 0.002, 16
#: How often it is looked how far the consumer is, and whether it is still as it should be.
LOOK_INTERVAL = 10.0
#: How soon after it was opened: another process that has just begun may have changed it.
FIRST_LOOK = 3.0
#: Where the server allows small pulls only, so many of them are open at a time.
OPEN_PULLS = 8
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

    :param before: called before they are sent; must not raise.
    """

    def __init__(self, link: PullLink, before: Callable[[], None] = lambda: None) -> None:
        self._link = link
        self._before = before
        self._replies: deque[bytes] = deque()
        self._scheduled = False

    def put(self, reply: bytes) -> None:
        """Queue the frame of one reply; never waits."""
        self._replies.append(reply)
        if not self._scheduled:
            self._scheduled = True
            self._link.wake(self._send_on)

    def _send_on(self) -> None:
        self._link.later(LINGER if self.flush() < BUSY else LINGER_BUSY, self._look_again)

    def _look_again(self) -> None:
        self._scheduled = False  # before the look: a reply put after it schedules itself
        if self._replies and self._link.is_up:
            self._scheduled = True
            self._send_on()

    def flush(self) -> int:
        """Send what is queued, and say how many; keep it while there is no connection."""
        if not self._link.is_up:
            return 0
        out = []
        while self._replies:
            out.append(self._replies.popleft())
        if out:
            self._before()
            self._link.send(out)
        return len(out)


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
        api: ConsumerApi,
        writer: ReplyWriter,
        config: ConsumerConfig,
        deliver: Callable[[Delivery], None],
        presence: Presence | None = None,
    ) -> None:
        self.config = config
        self.needs = Needs.of(config)
        self._link = link
        self._api = api
        self._writer = writer
        self.deliver = deliver
        self._wanted = 0
        self._outstanding = 0
        self._floor = Floor()
        self._inbox = ""
        self._key: int | None = None
        self._heard = time.monotonic()
        self._floor_seen = 0.0
        self._misses = 0
        self._presence = presence
        #: Told which subjects were taken away since which message, and no subjects at the start.
        self.on_missed: Callable[[Pull, tuple[str, ...], int], None] = lambda *_: None
        #: Another pull into the same hands, which ends with this one.
        self.companion: Puller | None = None
        #: The last message delivered while the consumer gave all that it should.
        self._complete_until = 0
        #: What keeps it from getting what it should; empty if nothing does.
        self._problem = ""
        self._is_owned = True
        self._shared_since: float | None = None
        self._was_opened = False
        self._noted: set[str] = set()
        #: How many were handed back that others are still to be asked for in place of.
        self._replaced = 0
        self._strangers = Strangers(self.needs, config.durable)
        #: When it was last asked what the consumer is.
        self._looked = 0.0
        self._limits = PullLimits(0, int(EXPIRES * NANO), int(HEARTBEAT * NANO))
        self._gives = self.needs
        self._stopped = False
        self._late: list[Delivery] = []
        self._stale = True
        self._opening = asyncio.Lock()
        self._reopening: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._next = ""

    # --- any thread

    def request(self, count: int) -> None:  # noqa: D102 - documented in the port
        self._link.wake(lambda: self._want(count))

    @property
    def is_healthy(self) -> bool:  # noqa: D102
        quiet = time.monotonic() - self._heard
        fits = not self._problem and self._link.is_up
        return fits and (self._outstanding == 0 or quiet < 2 * HEARTBEAT + 1)

    @property
    def ack_wait(self) -> float:  # noqa: D102
        return self._gives.ack_wait

    @property
    def is_closed(self) -> bool:
        """Whether it pulls no more."""
        return self._stopped

    @property
    def consumer(self) -> tuple[str, str]:  # noqa: D102
        return self.config.stream, self.config.durable

    def stop(self, timeout: float = 5.0) -> None:  # noqa: D102
        self._link.run(self.close(), timeout)

    # --- the loop's thread

    async def open(self, after: Floor | None = None) -> None:
        """Make the consumer and start pulling; the errors of ``Broker.consume``.

        :param after: where a consumer begins that is not there yet.
        """
        async with self._opening:
            if not self._stale:
                return
            self._floor = after or self._floor
            await self._ensure()
            await self._new_inbox()
        if self._watching is None:
            self._watching = self._link.spawn(self._watch())
            self.on_missed(self, (), 0)

    async def _ensure(self) -> None:
        """Make the consumer what it should be, and note what it is."""
        self.config = await self._api.place(self.config)
        self._next = f"{self._api.prefix}.CONSUMER.MSG.NEXT.{'.'.join(self.consumer)}"
        since = self._shared_since
        report = await self._api.ensure_consumer(
            self.config,
            standing=Standing(
                after=self._floor,
                others=self._ask_others if self._presence is not None else None,
                starting=not self._was_opened,
                unneeded=0.0 if since is None else time.monotonic() - since,
            ),
        )
        self._was_opened = True
        self._is_owned = not report.get("foreign")
        self._problem = ""
        self._note(report)
        if self.needs.covers(self._gives):
            self._shared_since = None
        self._floor_seen -= LOOK_INTERVAL - FIRST_LOOK
        for note in report.get("notes", ()):
            if note not in self._noted:
                self._noted.add(note)
                _log.warning("%s: %s", self.config.durable, note)

    async def _ask_others(self, offer: Needs) -> bool | None:
        assert self._presence is not None
        needed = await self._presence.is_more_needed(self, offer)
        if needed:
            self._shared_since = None
        elif self._shared_since is None:
            self._shared_since = time.monotonic()
        return needed

    async def close(self) -> None:
        """Stop pulling, and hand back what was on its way."""
        self._stopped = True
        if self.companion is not None:
            await self.companion.close()
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
        limits, most = self._limits, self._limits.batch
        while self._wanted:
            count = self._wanted
            if most:
                count = min(count, most, OPEN_PULLS * most - self._outstanding)
                if count <= 0:
                    return  # the rest is asked for when some of it has come
            body = {"batch": count, "expires": limits.expires, "idle_heartbeat": limits.heartbeat}
            self._outstanding += count
            self._wanted -= count
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
        if self._wanted:
            self._pump()
        delivery = NatsDelivery(subject, reply, headers, data, self._writer)
        if self._stopped:
            self._late.append(delivery)
        elif subject in self._strangers.known or self._strangers.is_ours(subject):
            self.deliver(delivery)
        else:
            self._hand_back(delivery)

    def _hand_back(self, delivery: Delivery) -> None:
        if self._strangers.hand_back(delivery, self._gives, self._looked):
            self._floor_seen = 0.0  # look soon
        if not self._replaced:
            self._link.later(ASK_AGAIN, self._ask_again)
        self._replaced += 1

    def _ask_again(self) -> None:
        count, self._replaced = self._replaced, 0
        self._want(count)

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
                self._problem = str(error)
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
        elif time.monotonic() - self._floor_seen > LOOK_INTERVAL:
            await self._look_at_consumer()

    async def _on_silence(self) -> None:
        self._misses += 1
        self._heard = time.monotonic()
        _log.warning("the pull for %s fell silent; making a new one", self.config.durable)
        if self._misses > 1:
            self._misses = 0
            await self._link.reset("pulls are silent")
        else:
            self._reopen("it was silent", 0.0)

    async def _look_at_consumer(self) -> None:
        """Keep how far it is, should it be deleted, and mend what others have changed."""
        asked = time.monotonic()
        try:
            report = await self._api.consumer(self.config.stream, self.config.durable)
        except NatsPubsubError:
            return
        if report is None:
            self._reopen("the consumer is gone", 0.0)
            return
        self._note(report)
        self._looked = asked
        lacking = self._gives.missing(self.needs) if self._is_owned else self._not_given()
        if lacking:
            self._complain(f"its consumer is not as declared, it lacks {', '.join(lacking)}")
        else:
            self._problem = ""
        if self._is_owned and (lacking or self.needs.missing(self._gives)):
            await self._mend()

    def _not_given(self) -> tuple[str, ...]:
        return tuple(one for one in self.needs.filter_subjects if not self._gives.wants(one))

    def _complain(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            _log.warning("%s: %s", self.config.durable, problem)

    async def _mend(self) -> None:
        """Give the consumer back what it lacks, or take away what nobody needs any more."""
        was, since = self._problem, self._complete_until
        missing = self._not_given()
        try:
            async with self._opening:
                await self._ensure()
        except NatsPubsubError as error:
            self._complain(str(error))
        else:
            if was:
                _log.warning("%s: its consumer is as declared again", self.config.durable)
            if missing:
                self.on_missed(self, missing, since)

    def _note(self, report: Mapping[str, Any]) -> None:
        """Take in how far the consumer is, and what it gives."""
        self._floor_seen = time.monotonic()
        sequence = int(report.get("ack_floor", {}).get("stream_seq", 0))
        self._floor = Floor(report.get("stream_created", self._floor.stream_created), sequence)
        config = report.get("config") or {}
        self._gives = needs_of(config) if config else self.needs
        self._limits = PullLimits.of(config, EXPIRES, HEARTBEAT)
        if not self._gives.missing(self.needs):
            self._complete_until = int((report.get("delivered") or {}).get("stream_seq", 0))
