"""Keeps one connection to NATS up, and says so to those who send and pull over it.

``Link.keep_up`` runs through the states of ``State``, at the start and after every loss. Each
state has one deadline and one line in the log for its failure, and leads back to ``DIALLING``
after a jittered pause. Dialling goes on for ever. What a connection or the dialling awaits is
awaited by ``within`` only, which ends in time whatever the coroutine does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...config.settings import Settings
from ...errors import BrokerError, NatsPubsubError, NotConnected
from ...text import describe, get_logger
from ..loop import BackgroundLoop
from ..wire import Route
from .connection import Connection, ConnectionLost, ConnectionRefused, Dial, LinkOwner, within
from .states import NEXT, TIMING, State, Timing, jittered

_log = get_logger("flask_natspubsub.broker")

DEFAULT_MAX_PAYLOAD = 1024 * 1024
#: Said where pytest runs: the usual test needs no server.
IN_A_TEST = "In a test, the fixture pubsub_broker takes the place of a server."

T = TypeVar("T")


class _Closing(Exception):
    """``Link.close`` was called: no other state follows."""


@dataclass(slots=True)
class _Interest:
    """A route: what is listened to, and the handle of the present connection's subscription."""

    subject: str
    handler: Route
    #: 0 while it is not subscribed.
    handle: int = 0


class Link:
    """The connection of one process. All but ``wake`` and ``run`` is for the loop's thread.

    :param dial: makes a connection to one server.
    :param owner: sets up the streams, and is told when the link is up, down or denied something.
    :param timing: default: ``TIMING``.
    """

    def __init__(
        self,
        settings: Settings,
        loop: BackgroundLoop,
        dial: Dial,
        owner: LinkOwner,
        timing: Timing | None = None,
    ) -> None:
        self.state = State.DOWN
        #: ``state is State.UP``; an attribute, since it is read for every message.
        self.is_up = False
        #: Whether the last try to connect has failed: not while the first is under way.
        self.has_failed = False
        #: Why the servers do not want us; empty if they do, or do not answer.
        self.refused = ""
        self.max_payload = DEFAULT_MAX_PAYLOAD
        self.server_version = ""
        self.cluster_size = 1
        self._settings = settings
        self._loop = loop
        self._dial = dial
        self._owner = owner
        self._timing = timing or TIMING
        self._connection: Connection | None = None
        self._routes: dict[int, _Interest] = {}
        self._route_number = 0
        self._changed = asyncio.Event()
        self._known = list(settings.urls)
        self._last_error = "not tried yet"
        self._logged = 0.0
        self._mended = 0.0

    # --- any thread

    def wake(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` soon on the loop; nothing happens once the loop is closed."""
        try:  # noqa: SIM105 - at each publish: a context manager would cost as much again
            self._loop.loop.call_soon_threadsafe(callback)
        except RuntimeError:
            pass

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float) -> T:
        """Run ``coroutine`` on the loop and return its result; any other thread.

        :raises NotConnected: it took longer than ``timeout`` seconds, without a connection.
        :raises BrokerError: the same, with one.
        """
        try:
            return self._loop.call(coroutine, timeout)
        except TimeoutError:
            if not self.is_up:
                raise NotConnected(self.describe_down()) from None
            raise BrokerError(
                f"The server did not answer within {timeout:g} s.", "Try again; check its load."
            ) from None

    def describe_down(self) -> str:
        """Say why there is no connection, without secrets."""
        down = self.refused or f"No connection to {self._settings.safe_urls}: {self._last_error}."
        return f"{down} {IN_A_TEST}" if "PYTEST_CURRENT_TEST" in os.environ else down

    # --- for those who send and pull

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` on the loop after ``seconds``."""
        self._loop.loop.call_later(seconds, callback)

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a task on the loop."""
        return self._loop.spawn(coroutine)

    def new_reply_subject(self) -> str:
        """Return a subject for replies that nobody else listens to."""
        return f"{self._settings.reply_prefix}.{secrets.token_hex(11)}"

    @property
    def unsent(self) -> int:
        """The number of bytes that were written and that the socket has not taken yet."""
        return self._connection.unsent if self._connection is not None else 0

    def send(self, frames: Sequence[bytes]) -> None:
        """Write frames of messages; what is written without a connection is lost."""
        if self._connection is not None:
            self._connection.send(frames)

    async def route(self, subject: str, handler: Route) -> int:
        """Pass what arrives on ``subject`` to ``handler``, after reconnects too.

        :returns: a key for ``unroute``.
        :raises BrokerError: the server did not take it; without a connection, the next is told.
        """
        self._route_number += 1
        key = self._route_number
        self._routes[key] = interest = _Interest(subject, handler)
        connection = self._connection
        if connection is None:
            return key
        subscribing = self._subscribe(connection, key, interest)
        try:
            await within(self._timing.subscribing, subscribing, connection.closed)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets one of ours
            if not connection.closed.is_set():
                await self.unroute(key)
                raise BrokerError(f"Could not listen to {subject}: {describe(error)}.") from None
        except BaseException:  # cancelled: the caller has no key to give it up with
            await self.unroute(key)
            raise
        return key

    async def unroute(self, key: int, *, flush: bool = False) -> None:
        """Lose interest; with ``flush``, only after what is on its way has arrived."""
        interest = self._routes.pop(key, None)
        connection = self._connection
        if interest is not None and interest.handle and connection is not None:
            ending = connection.unsubscribe(interest.handle, flush=flush)
            with contextlib.suppress(Exception):  # a lost connection has lost it as well
                await within(self._timing.subscribing, ending, connection.closed)

    async def _subscribe(self, connection: Connection, key: int, interest: _Interest) -> None:
        handle = await connection.subscribe(interest.subject, interest.handler)
        if key not in self._routes:  # given up meanwhile
            await connection.unsubscribe(handle, flush=False)
        elif not connection.closed.is_set():  # the next connection has handles of its own
            interest.handle = handle

    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        """Send a request and return its reply, waiting for a connection if need be.

        :raises NotConnected: there was none within ``timeout`` seconds.
        :raises BrokerError: no reply came.
        """
        try:
            async with asyncio.timeout(timeout):
                connection = await self._wait_connection()
                asking = connection.request(subject, payload, timeout)
                return await within(timeout, asking, connection.closed)
        except LookupError:
            raise BrokerError(
                f"Nobody answers on {subject}.", "Is JetStream enabled on the server (-js)?"
            ) from None
        except ConnectionLost:
            raise BrokerError(f"No answer from {subject}: the connection was lost.") from None
        except TimeoutError:
            if self._connection is None:
                raise NotConnected(self.describe_down()) from None
            raise BrokerError(
                f"The server did not answer {subject} within {timeout:g} s.",
                "Try again; check its load.",
            ) from None

    async def wait_up(self, timeout: float) -> None:
        """Wait until the link is up.

        :raises NotConnected: it is not within ``timeout`` seconds, or the servers refuse us.
        """
        try:
            async with asyncio.timeout(timeout):
                while not self.is_up:
                    if self.refused:
                        raise NotConnected(self.refused)
                    await self._changed.wait()
        except TimeoutError:
            raise NotConnected(self.describe_down()) from None

    async def _wait_connection(self) -> Connection:
        """Wait for the connection itself: the streams are set up before it counts as up."""
        while self._connection is None:
            if self.refused:
                raise NotConnected(self.refused)
            await self._changed.wait()
        return self._connection

    def mend_streams(self) -> None:
        """Have the owner set up the streams again, unless that was a moment ago."""
        now = time.monotonic()
        if now - self._mended > self._timing.mend_interval:
            self._mended = now
            self.spawn(self.set_up())

    async def reset(self, why: str) -> None:
        """Drop the connection and make a new one."""
        if self._connection is not None:
            _log.warning("reconnecting to NATS: %s", why)
            await self._connection.close()

    async def close(self, timeout: float) -> None:
        """Send what is buffered, within ``timeout`` seconds, and close for good."""
        self.state, self.is_up = State.CLOSING, False
        self._notify()
        if (connection := self._connection) is not None:
            with contextlib.suppress(Exception):  # closing anyway
                await within(timeout, connection.flush(), connection.closed)
            await connection.close()

    # --- the states

    async def keep_up(self) -> None:
        """Connect, and connect again, until ``close``: one round of the states each time."""
        pause = self._timing.first_pause
        while self.state is not State.CLOSING:
            began, was_up = time.monotonic(), False
            try:
                connection = await self._dial_any()
                try:
                    await self._subscribe_all(connection)
                    was_up = True
                    await self._serve(connection)
                finally:  # also when the loop is torn down: the socket must not outlive it
                    await connection.close()
            except _Closing:
                return
            except ConnectionRefused as error:
                self._refuse(f"{self._settings.safe_urls} refused the connection: {error}.")
                await self._sleep(jittered(self._timing.refused_pause, self._timing))
                continue
            except (OSError, TimeoutError, NatsPubsubError) as error:
                self._fail(describe(error))
            except Exception as error:  # noqa: BLE001 - whatever it is, this task must live on
                _log.exception("connecting to NATS failed in an unforeseen way")
                self._fail(type(error).__name__)
            if time.monotonic() - began > self._timing.stable:
                pause = self._timing.first_pause
            await self._sleep(jittered(pause, self._timing, was_up=was_up))
            pause = min(pause * 2, self._timing.longest_pause)

    def _enter(self, state: State) -> None:
        """Change the state, as ``NEXT`` allows.

        :raises _Closing: ``close`` was called, and the next state would not be a pause.
        """
        if self.state is State.CLOSING:
            if state in (State.DOWN, State.REFUSED):
                return
            raise _Closing
        assert state is self.state or state in NEXT[self.state], f"{self.state}, then {state}"
        self.state = state
        self.is_up = state is State.UP

    @property
    def dial_deadline(self) -> float:
        """Seconds for one server: to connect, to greet, to secure the connection, to sign in."""
        return self._settings.connect_timeout * 2 + 1

    async def _dial_any(self) -> Connection:
        self._enter(State.DIALLING)
        failures: list[Exception] = []
        for url in random.sample(self._known, len(self._known)):
            try:
                dialling = self._dial(self._settings, url, self._denied)
                return await within(self.dial_deadline, dialling)
            except (OSError, TimeoutError, NatsPubsubError, ConnectionRefused) as error:
                failures.append(error)
        # Refused is only who was refused by all: the others may be back in a moment.
        raise min(failures, key=lambda error: isinstance(error, ConnectionRefused))

    async def _subscribe_all(self, connection: Connection) -> None:
        """Subscribe for every route, all at once, and for those that are added meanwhile.

        :raises OSError: it broke before it could be used.
        :raises ConnectionRefused: it is of no use, since no replies may come.
        """
        self._enter(State.SUBSCRIBING)
        deadline = time.monotonic() + self._timing.subscribing
        for interest in self._routes.values():
            interest.handle = 0
        try:
            # Nothing is awaited between the last look and the use of the connection: a route
            # that is added meanwhile would not be subscribed.
            while new := [(key, one) for key, one in self._routes.items() if not one.handle]:
                subscribing = self._subscribe_each(connection, new)
                await within(deadline - time.monotonic(), subscribing, connection.closed)
        except (ConnectionRefused, TimeoutError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is dialled again
            raise OSError(describe(error)) from None

    async def _subscribe_each(
        self, connection: Connection, routes: Sequence[tuple[int, _Interest]]
    ) -> None:
        await asyncio.gather(*(self._subscribe(connection, *route) for route in routes))

    async def _serve(self, connection: Connection) -> None:
        """Let the owner set up the streams and use the connection until its end."""
        self._known = [*dict.fromkeys([*self._settings.urls, *connection.servers])]
        self.max_payload = connection.max_payload
        self.server_version = connection.version
        self.cluster_size = connection.cluster_size
        self.refused = ""
        self._last_error = "connected, the streams are being looked after"
        self._connection = connection
        try:
            self._enter(State.SETTING_UP)
            self._notify()
            await self.set_up()
            if not connection.closed.is_set():
                self._enter(State.UP)
                self._on_up()
                await connection.closed.wait()
        finally:
            self._connection = None
            self._on_down()

    async def set_up(self) -> None:
        """Have the owner set up the streams; a failure is logged."""
        connection, limit = self._connection, self._timing.setting_up
        lost = connection.closed if connection is not None else None
        try:
            await within(limit, self._owner.set_up(), lost)
        except TimeoutError:
            _log.error("the streams could not be set up within %g s", limit)
        except (NatsPubsubError, ConnectionLost) as error:
            _log.error("the streams could not be set up: %s", error)
        except Exception:  # noqa: BLE001 - an answer without sense must not stop the link
            _log.exception("the streams could not be set up")

    def _on_up(self) -> None:
        _log.info("connected to NATS at %s", self._settings.safe_urls)
        self._logged = 0.0
        self.has_failed = False
        self._notify()
        self._owner.on_up()

    def _on_down(self) -> None:
        if self.state is not State.CLOSING:
            _log.warning("lost the connection to NATS; reconnecting")
        self._last_error = "the connection was lost"
        self._enter(State.DOWN)
        self._owner.on_down()

    def _refuse(self, refusal: str) -> None:
        self._enter(State.REFUSED)
        self.has_failed = True
        self.refused = refusal
        self._last_error = "refused"
        _log.error("%s Trying again every %g s.", refusal, self._timing.refused_pause)
        self._notify()
        self._owner.on_down()

    def _fail(self, why: str) -> None:
        self._enter(State.DOWN)
        self.has_failed = True
        self.refused = ""
        self._last_error = why
        now = time.monotonic()
        if now - self._logged >= self._timing.log_interval or not self._logged:
            self._logged = now
            _log.warning("%s Still trying.", self.describe_down())

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.state is not State.CLOSING:
                    await self._changed.wait()

    def _notify(self) -> None:
        """Wake up all who wait for another state."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _denied(self, subject: str, why: str) -> None:
        _log.error("permission denied by the server: %s", why)
        self._owner.on_denied(subject)
