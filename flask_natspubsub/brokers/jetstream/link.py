"""Keeps one connection to NATS up, and says so to those who send and pull over it.

There is one way to get a connection, used at the start and after every loss: dial a server,
restore the routes, look after the streams, then tell everybody. While there is none, dialling
goes on for ever with growing, jittered pauses, and one log line per ``LOG_INTERVAL``.
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
from .connection import Connection, ConnectionRefused, Dial, Listener

_log = get_logger("flask_natspubsub.broker")

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 2.0
# All clients lose a server at the same moment; they return at any moment of so many seconds.
RETURN_WITHIN = 1.0
STABLE = 5.0
REFUSED_PAUSE = 30.0
LOG_INTERVAL = 10.0
MEND_INTERVAL = 1.0
DEFAULT_MAX_PAYLOAD = 1024 * 1024
#: Said where pytest runs: the usual test needs no server.
IN_A_TEST = "In a test, the fixture pubsub_broker takes the place of a server."

T = TypeVar("T")


@dataclass(slots=True)
class _Interest:
    """What is listened to, and the handle for that of the present connection; 0: none yet."""

    subject: str
    handler: Route
    handle: int = 0


class Link:
    """The connection of one process. All but ``wake`` and ``run`` is for the loop's thread."""

    def __init__(self, settings: Settings, loop: BackgroundLoop, dial: Dial) -> None:
        self.is_up = False
        #: Whether the last try to connect has failed: not while the first is under way.
        self.has_failed = False
        self.refused = ""
        self.max_payload = DEFAULT_MAX_PAYLOAD
        self.server_version = ""
        self.cluster_size = 1
        self.listeners: list[Listener] = []
        self.on_denied: Callable[[str], None] = lambda subject: None
        self.set_up: Callable[[], Coroutine[Any, Any, None]] = _nothing
        self._settings = settings
        self._loop = loop
        self._dial = dial
        self._connection: Connection | None = None
        self._routes: dict[int, _Interest] = {}
        self._route_number = 0
        self._changed = asyncio.Event()
        self._known = list(settings.urls)
        self._last_error = "not tried yet"
        self._logged = 0.0
        self._mended = 0.0
        self._closing = False

    # --- any thread

    def wake(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` soon on the loop; nothing happens once the loop is closed."""
        try:  # noqa: SIM105 - at each publish: a context manager would cost as much again
            self._loop.loop.call_soon_threadsafe(callback)
        except RuntimeError:
            pass

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float) -> T:
        """Run on the loop and wait; NotConnected or BrokerError when it takes too long."""
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
        """Call ``callback`` after ``seconds``."""
        self._loop.loop.call_later(seconds, callback)

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a task."""
        return self._loop.spawn(coroutine)

    def new_inbox(self) -> str:
        """Return a subject that nobody else listens to."""
        return f"{self._settings.reply_prefix}.{secrets.token_hex(11)}"

    @property
    def unsent(self) -> int:
        """How many bytes were written that the socket has not taken yet."""
        return self._connection.unsent if self._connection is not None else 0

    def send(self, frames: Sequence[bytes]) -> None:
        """Write frames of messages; what is written without a connection is lost."""
        if self._connection is not None:
            self._connection.send(frames)

    async def route(self, subject: str, handler: Route) -> int:
        """Have what arrives on ``subject`` passed to ``handler``, after reconnects too.

        :raises BrokerError: the server did not take it; without a connection, the next is told.
        """
        self._route_number += 1
        key = self._route_number
        self._routes[key] = interest = _Interest(subject, handler)
        connection = self._connection
        if connection is None:
            return key
        try:
            await self._subscribe(connection, key, interest)
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
        if interest is not None and interest.handle and self._connection is not None:
            with contextlib.suppress(Exception):  # a lost connection has lost it as well
                await self._connection.unsubscribe(interest.handle, flush=flush)

    async def _subscribe(self, connection: Connection, key: int, interest: _Interest) -> None:
        handle = await connection.subscribe(interest.subject, interest.handler)
        if key not in self._routes:  # given up meanwhile
            await connection.unsubscribe(handle, flush=False)
        elif not connection.closed.is_set():  # the next connection has handles of its own
            interest.handle = handle

    async def _subscribe_all(self, connection: Connection) -> None:
        """Subscribe for every route, also for those that are added while we do."""
        for interest in self._routes.values():
            interest.handle = 0
        while pending := [(key, one) for key, one in self._routes.items() if not one.handle]:
            for key, interest in pending:
                await self._subscribe(connection, key, interest)

    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        """Ask the server, waiting for a connection if need be."""
        try:
            async with asyncio.timeout(timeout):
                connection = await self._wait_connection()
                return await connection.request(subject, payload, timeout)
        except LookupError:
            raise BrokerError(
                f"Nobody answers on {subject}.", "Is JetStream enabled on the server (-js)?"
            ) from None
        except TimeoutError:
            if self._connection is None:
                raise NotConnected(self.describe_down()) from None
            raise BrokerError(
                f"The server did not answer {subject} within {timeout:g} s.",
                "Try again; check its load.",
            ) from None

    async def wait_up(self, timeout: float) -> None:
        """Wait for a connection; NotConnected if there is none in time or we are refused."""
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
        """Look after the streams again, unless that was a moment ago."""
        now = time.monotonic()
        if now - self._mended > MEND_INTERVAL:
            self._mended = now
            self.spawn(self.set_up())

    async def reset(self, why: str) -> None:
        """Drop the connection and make a new one."""
        if self._connection is not None:
            _log.warning("reconnecting to NATS: %s", why)
            await self._connection.close()

    # --- the supervisor

    async def keep_up(self) -> None:
        """Connect, and connect again, until ``close``."""
        pause = FIRST_PAUSE
        while not self._closing:
            began = time.monotonic()
            was_up = False
            try:
                await self._serve(await self._dial_any())
                was_up = True
            except ConnectionRefused as error:
                self._fail(f"{self._settings.safe_urls} refused the connection: {error}.")
                await self._sleep(jittered(REFUSED_PAUSE))
                continue
            except (OSError, TimeoutError, NatsPubsubError) as error:
                self._down(describe(error))
            except Exception as error:  # noqa: BLE001 - whatever it is, this task must live on
                _log.exception("connecting to NATS failed in an unforeseen way")
                self._down(type(error).__name__)
            if time.monotonic() - began > STABLE:
                pause = FIRST_PAUSE
            await self._sleep(jittered(pause, was_up=was_up))
            pause = min(pause * 2, LONGEST_PAUSE)

    async def close(self, timeout: float) -> None:
        """Send what is buffered and close."""
        self._closing = True
        self._notify()
        if self._connection is not None:
            with contextlib.suppress(Exception):  # closing anyway
                await self._connection.flush(timeout)
            await self._connection.close()

    async def _dial_any(self) -> Connection:
        failures: list[Exception] = []
        for url in random.sample(self._known, len(self._known)):
            try:
                return await self._dial(self._settings, url, self._denied)
            except (OSError, TimeoutError, NatsPubsubError, ConnectionRefused) as error:
                failures.append(error)
        # Refused is only who was refused by all: the others may be back in a moment.
        raise min(failures, key=lambda error: isinstance(error, ConnectionRefused))

    async def _serve(self, connection: Connection) -> None:
        """Announce the connection, wait for its end, announce that.

        :raises OSError: it broke before it could be used.
        :raises ConnectionRefused: it is of no use, since no answers may come.
        """
        try:
            await self._subscribe_all(connection)
        except Exception as error:
            await connection.close()
            if isinstance(error, ConnectionRefused):
                raise
            raise OSError(describe(error)) from None
        self._known = [*dict.fromkeys([*self._settings.urls, *connection.servers])]
        self.max_payload = connection.max_payload
        self.server_version = connection.version
        self.cluster_size = connection.cluster_size
        self._connection = connection
        self.refused = ""
        self._last_error = "connected, the streams are being looked after"
        self._notify()
        try:
            await self.set_up()
            if not connection.closed.is_set():
                self._on_up()
                await connection.closed.wait()
        finally:  # also when the loop is torn down: the socket must not outlive it
            self._connection = None
            self._on_down()
            await connection.close()

    def _on_up(self) -> None:
        _log.info("connected to NATS at %s", self._settings.safe_urls)
        self._logged = 0.0
        self.is_up = True
        self.has_failed = False
        self._notify()
        for listener in list(self.listeners):
            listener.on_up()

    def _on_down(self) -> None:
        self.is_up = False
        self._last_error = "the connection was lost"
        if not self._closing:
            _log.warning("lost the connection to NATS; reconnecting")
        for listener in list(self.listeners):
            listener.on_down()

    def _fail(self, refusal: str) -> None:
        self.has_failed = True
        self.refused = refusal
        self._last_error = "refused"
        _log.error("%s Trying again every %g s.", refusal, REFUSED_PAUSE)
        self._notify()
        for listener in list(self.listeners):
            listener.on_down()

    def _denied(self, subject: str, why: str) -> None:
        _log.error("permission denied by the server: %s", why)
        self.on_denied(subject)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _down(self, why: str) -> None:
        self.has_failed = True
        self.refused = ""
        self._last_error = why
        now = time.monotonic()
        if now - self._logged >= LOG_INTERVAL or not self._logged:
            self._logged = now
            _log.warning("%s Still trying.", self.describe_down())

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._closing:
                    await self._changed.wait()


def jittered(pause: float, *, was_up: bool = False) -> float:
    """Return about ``pause`` seconds, or any moment from now on if it ``was_up`` until now."""
    shortest, longest = pause / 2, pause / 2 + max(pause, FIRST_PAUSE)
    if was_up:
        shortest, longest = 0.0, max(longest, RETURN_WITHIN)
    return random.uniform(shortest, longest)  # noqa: S311 - nothing secret


async def _nothing() -> None:
    """Stand in until there are streams to look after."""
