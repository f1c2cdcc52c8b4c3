"""A continuous pull on one durable consumer.

JetStream sends nothing unasked: each pull request asks for a number of messages, lives for
``Timing.expires`` and is kept alive by heartbeats. What this module adds is that a request is
never forgotten: an expired one is sent again, a silent one is replaced, a deleted consumer is
made anew, and a new connection starts over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import NatsPubsubError
from ...messages.codec import encode_value
from ...text import get_logger
from ..agreement import Needs
from ..base import ConsumerConfig, Consumption, Delivery
from ..wire import DESCRIPTION, STATUS, frame
from .consumer_api import Floor, PullLimits, Standing, needs_of
from .settling import NatsDelivery
from .strangers import ASK_AGAIN, Strangers

if TYPE_CHECKING:
    from .broker import Session

_log = get_logger("flask_natspubsub.broker")


class Timing(NamedTuple):
    """The intervals of a pull, in seconds."""

    #: After which a pull request ends at the server.
    expires: float = 30.0
    #: A pull request can vanish without a word: the server drops one that it has not looked at
    #: yet when the consumer is deleted. Two missed heartbeats tell: a silent pull is replaced
    #: within 7 seconds.
    heartbeat: float = 2.5
    #: Between two looks at how far the consumer is, and whether it is still as it should be.
    look: float = 10.0
    #: From the opening to the first: another process that has just begun may have changed it.
    first_look: float = 3.0
    #: Without a message, until the next look: the server may hold new ones back.
    quiet: float = 5.0
    #: After two missed heartbeats, until the pull counts as unhealthy.
    grace: float = 1.0
    #: Before a pull that the server has ended is opened anew; doubled each time that this fails.
    retry: float = 0.25
    longest_retry: float = 5.0


TIMING = Timing()
#: The number of pull requests open at a time, where the server allows small ones only.
OPEN_PULLS = 8
#: A pull request asks for the ``PART``-th part of the bytes that may be on their way.
PART = 16
#: Bytes of a message besides payload and headers: its subject, and that of its ack.
SUBJECTS = 64 * 1024
PENDING = "Nats-Pending-Messages"
PENDING_BYTES = "Nats-Pending-Bytes"
TOO_LARGE = "Message Size Exceeds MaxBytes"
#: Said of a request with ``max_bytes`` that has brought all it may.
COMPLETED = "Batch Completed"


class Pull(Consumption):
    """See ``Consumption``. All but ``request``, ``ping`` and ``stop`` runs on the loop's thread.

    :param session: what this pull shares with the others of the process.
    :param deliver: called with each message, on the loop's thread.
    :param is_companion: whether it catches up for another pull, and nobody for it.
    :param timing: default: ``TIMING``.
    """

    def __init__(
        self,
        session: Session,
        config: ConsumerConfig,
        deliver: Callable[[Delivery], None],
        *,
        is_companion: bool = False,
        timing: Timing | None = None,
    ) -> None:
        self.config = config
        self.needs = Needs.of(config)
        self.deliver = deliver
        self._session = session
        self._link = session.link
        self._api = session.api
        self._writer = session.writer
        self._is_companion = is_companion
        self._timing = timing or TIMING
        self._wanted = 0
        self._outstanding = 0
        #: The highest number of pull requests that the server may still have.
        self._requests = 0
        self._bytes = 0
        #: The limit in bytes that the consumer, made by others, puts on a request; 0: none.
        self._bytes_limit = 0
        self._spare: Callable[[int], None] = self._want
        #: Whether the next message is larger than a request may be.
        self._oversized = False
        self._arrived = time.monotonic()
        #: The server's limit of unsettled messages, where it is lower than was asked for; else 0.
        self._limit = 0
        #: Whether that limit is reached, and new messages therefore wait.
        self._is_held_back = False
        self._floor = Floor()
        self._reply_subject = ""
        self._key: int | None = None
        self._heard = time.monotonic()
        self._floor_seen = 0.0
        self._misses = 0
        #: Another pull into the same hands, which ends with this one.
        self.companion: Pull | None = None
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
        self._limits = PullLimits.of({}, self._timing.expires, self._timing.heartbeat)
        self._gives = self.needs
        self._stopped = False
        self._late: list[Delivery] = []
        self._stale = True
        self._opening = asyncio.Lock()
        self._reopening: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._next = ""
        session.pulls.add(self)

    # --- any thread

    def request(self, count: int) -> None:  # noqa: D102 - documented in the port
        self._link.wake(lambda: self._want(count))

    def bound(self, size: int, spare: Callable[[int], None]) -> None:  # noqa: D102
        self._bytes, self._spare = size, spare

    @property
    def is_healthy(self) -> bool:  # noqa: D102
        quiet = time.monotonic() - self._heard
        fits = not self._problem and not self._is_held_back and self._link.is_up
        is_heard = quiet < 2 * self._timing.heartbeat + self._timing.grace
        return self._session.loop.is_alive and fits and (not self._outstanding or is_heard)

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

    def ping(self, callback: Callable[[], None]) -> None:  # noqa: D102
        self._link.wake(callback)

    def stop(self, timeout: float = 5.0) -> None:  # noqa: D102
        self._session.pulls.discard(self)
        if self._session.loop.is_alive:
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
            await self._new_reply_subject()
        if self._watching is None:
            self._watching = self._link.spawn(self._watch())
            self._catch_up((), 0)

    async def _ensure(self) -> None:
        """Make the consumer what it should be, and note what it is."""
        self.config = await self._api.place(self.config)
        self._next = f"{self._api.prefix}.CONSUMER.MSG.NEXT.{'.'.join(self.consumer)}"
        since = self._shared_since
        report = await self._api.ensure_consumer(
            self.config,
            standing=Standing(
                after=self._floor,
                others=self._ask_others,
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
        self._floor_seen -= self._timing.look - self._timing.first_look
        for note in report.get("notes", ()):
            if note not in self._noted:
                self._noted.add(note)
                _log.warning("%s: %s", self.config.durable, note)

    async def _ask_others(self, offer: Needs) -> bool | None:
        needed = await self._session.presence.is_more_needed(self, offer)
        if needed:
            self._shared_since = None
        elif self._shared_since is None:
            self._shared_since = time.monotonic()
        return needed

    async def close(self) -> None:
        """Stop pulling, and hand back what was on its way."""
        self._stopped = True
        self._session.pulls.discard(self)
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
        limits, batch = self._limits, self._limits.batch
        while self._wanted:
            if self._bytes and self._requests >= max(1, self._bytes // self._part):
                return  # when all of them have ended, this is called again
            count = 1 if self._oversized else self._wanted
            if batch:
                count = min(count, batch, OPEN_PULLS * batch - self._outstanding)
                if count <= 0:
                    return  # the rest is asked for when some of it has come
            body = {"batch": count, "expires": limits.expires, "idle_heartbeat": limits.heartbeat}
            if self._bytes and not self._oversized:
                body["max_bytes"] = self._part
            self._oversized = False
            self._requests += 1
            self._outstanding += count
            self._wanted -= count
            self._link.send([frame(self._next, encode_value(body), self._reply_subject)])

    @property
    def _part(self) -> int:
        """The limit in bytes of one request: any message that the server takes today fits in."""
        part = max(self._bytes // PART, self._link.max_payload + SUBJECTS)
        return min(part, self._bytes_limit) if self._bytes_limit else part

    def _on_message(
        self, subject: str, reply: str, headers: Mapping[str, str], data: bytes
    ) -> None:
        self._heard = now = time.monotonic()
        self._misses = 0
        if not data and STATUS in headers and not reply.startswith("$JS.ACK"):
            self._on_status(headers)
            return
        self._arrived = now
        if self._outstanding:
            self._outstanding -= 1
            if not self._outstanding:
                self._requests = 0
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
            self._wanted += self._take_back(headers)
            self._pump()
        elif why == COMPLETED and headers.get(PENDING) == "0":
            self._requests = max(0, self._requests - 1) if self._outstanding else 0
            self._pump()
        elif why in (TOO_LARGE, COMPLETED):
            self._on_too_large(self._take_back(headers), int(headers.get(PENDING_BYTES, 0)))
        else:
            self._reopen(why or f"status {status}", self._timing.retry)

    def _take_back(self, headers: Mapping[str, str]) -> int:
        """Note that a request has ended; returns for how many messages it has not been used."""
        unused = min(int(headers.get(PENDING, 0)), self._outstanding)
        self._outstanding -= unused
        self._requests = max(0, self._requests - 1) if self._outstanding else 0
        return unused

    def _on_too_large(self, unused: int, left: int) -> None:
        """Give back what a request did not bring, since the next message is more than was left."""
        if left >= self._part and unused:  # nothing was used up: it is larger than any request
            self._oversized = True
            self._wanted += 1
            unused -= 1
        self._pump()
        if unused:
            self._spare(unused)

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
                delay = max(delay * 2, self._timing.retry)
                delay = min(delay, self._timing.longest_retry)
                continue
            _log.debug("pulling anew for %s: %s", self.config.durable, why)
            return

    async def _new_reply_subject(self) -> None:
        """Pull to a fresh reply subject. The server drops the pulls of one that nobody listens to.

        What was on its way to the old one still arrives.
        """
        old, self._key = self._key, None
        if old is not None:
            await self._link.unroute(old, flush=True)
        self._reply_subject = self._link.new_reply_subject()
        self._key = await self._link.route(self._reply_subject, self._on_message)
        self._wanted += self._outstanding
        self._outstanding = self._requests = 0
        self._heard = time.monotonic()
        self._stale = False
        self._pump()

    def _catch_up(self, filters: tuple[str, ...], after: int) -> None:
        if not self._is_companion:
            self._session.catch_up(self, filters, after)

    async def _watch(self) -> None:
        while not self._stopped:
            await asyncio.sleep(self._timing.heartbeat / 2)
            try:
                await self._look()
            except Exception:  # noqa: BLE001 - nobody else would notice a silent pull
                _log.exception("looking after the pull for %s failed", self.config.durable)

    async def _look(self) -> None:
        if not self._link.is_up:
            return
        now = time.monotonic()
        if self._outstanding and now - self._heard > 2 * self._timing.heartbeat:
            await self._on_silence()
        elif now - self._floor_seen > self._until_next_look:
            await self._look_at_consumer()

    @property
    def _until_next_look(self) -> float:
        return self._timing.quiet if self._limit and self._is_quiet else self._timing.look

    @property
    def _is_quiet(self) -> bool:
        return self._outstanding > 0 and time.monotonic() - self._arrived > self._timing.quiet

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
                self._catch_up(missing, since)

    def _note(self, report: Mapping[str, Any]) -> None:
        """Take in how far the consumer is, and what it gives."""
        self._floor_seen = time.monotonic()
        sequence = int(report.get("ack_floor", {}).get("stream_seq", 0))
        self._floor = Floor(report.get("stream_created", self._floor.stream_created), sequence)
        config = report.get("config") or {}
        self._gives = needs_of(config) if config else self.needs
        self._limits = PullLimits.of(config, self._timing.expires, self._timing.heartbeat)
        if not self._gives.missing(self.needs):
            self._complete_until = int((report.get("delivered") or {}).get("stream_seq", 0))
        self._bytes_limit = int(config.get("max_bytes") or 0)
        limit = int(config.get("max_ack_pending") or 0)
        self._limit = limit if 0 < limit < self.config.max_ack_pending else 0
        self._note_what_is_held_back(report, limit)

    def _note_what_is_held_back(self, report: Mapping[str, Any], limit: int) -> None:
        """Log when new messages wait because the server's limit of unsettled ones is reached."""
        full = 1 < limit <= int(report.get("num_ack_pending", 0))
        before = self._is_held_back
        self._is_held_back = full and self._is_quiet and bool(report.get("num_pending"))
        if self._is_held_back and not before:
            _log.error(
                "%s: %d messages wait for their retry, and the server allows no more "
                "(max_ack_pending): new ones are not handed out until some of those are done. "
                "Raise max_ack_pending in the limits of the account or the stream",
                self.config.durable,
                limit,
            )
