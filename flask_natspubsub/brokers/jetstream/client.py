"""NATS JetStream behind the port: the only module that imports ``nats``.

nats-py speaks the protocol over one connection; *when* there is a new connection is decided
by ``Link``, since nats-py gives up after a while, waits a fixed time and forgets pulls.
Nothing starts before the first call, and a forked child starts afresh.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import ssl
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from ...config.settings import Settings
from ...errors import BrokerError, ConfigurationError, RequestDenied
from ...text import get_logger, printable
from ..wire import NO_HEADERS, NOT_PASSED_ON, FrameTap, Route
from .broker import JetStreamBroker
from .connection import ConnectionRefused
from .tls import tls_problem

_log = get_logger("flask_natspubsub.broker")

_BAD_CREDENTIALS = re.compile(r"authoriz|authentication (?!timeout)", re.I)
OLDEST_SERVER = (2, 10)
# A link that has gone dead is given up at the third ping, so after 27 seconds at most.
PING_INTERVAL = 9.0
UNANSWERED_PINGS = 2
CLOSE_TIMEOUT = 1.0
#: How long the server may take to do what it is told, when there is a connection; seconds.
ROUND_TRIP_TIMEOUT = 3.0
_NOT_ALLOWED = "the server does not let this user send to it"
_DENIED = re.compile(
    r"permissions violation(?: for (?P<kind>publish|subscription) to [\"'](?P<subject>[^\"']+))?",
    re.I,
)


class _Client(Client):
    """nats-py, which says sooner that a connection is lost and never goes without TLS."""

    def __init__(self, on_denied: Callable[[str, str], None]) -> None:
        super().__init__()
        self.needs_tls = False
        self.lost = asyncio.Event()
        self.last_problem: Exception | None = None
        #: Requests under way, by what ends them early: the future's result says why.
        self.asked: dict[asyncio.Future[str], str] = {}
        self._on_denied = on_denied
        self._denied_to_listen: set[str] = set()

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Insist on TLS before the CONNECT that carries the credentials is sent."""
        if self.needs_tls and initial_connection:
            if not (info.get("tls_required") or info.get("tls_available")):
                raise nats.errors.SecureConnWantedError
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)

    async def _process_op_err(self, e: Exception) -> None:
        """Say at once that the connection is gone; nats-py says so in the end."""
        self.lose()
        await super()._process_op_err(e)

    def lose(self) -> None:
        """Tell all who wait that nothing comes any more.

        What nats-py has buffered is dropped, or it would wait for somebody to read it.
        """
        self._pending, self._pending_data_size = [], 0
        self.lost.set()
        self._end_requests("the connection was lost")

    def _end_requests(self, why: str, subject: str | None = None) -> None:
        for early_end, asked in self.asked.items():
            if subject in (None, asked.lower()) and not early_end.done():
                early_end.set_result(why)

    async def on_error(self, error: Exception) -> None:
        """Note what nats-py reports; a refused publish is reported here and nowhere else."""
        self.last_problem = error
        denied = _DENIED.search(str(error))
        if denied and denied["kind"] == "subscription":
            self._denied_to_listen.add((denied["subject"] or "").lower())
            self._on_denied("", _text_of(error))
        elif denied:
            subject = (denied["subject"] or "").lower()
            self._end_requests(_NOT_ALLOWED, subject)
            self._on_denied(subject, _text_of(error))

    def check_listens(self, subject: str) -> None:
        """Refuse a connection on which no answers can come.

        Without a hint of the relay, say, one can live; without acknowledgements one cannot.
        """
        prefix = self._inbox_prefix.decode()
        if subject.startswith(f"{prefix}.") and subject.lower() in self._denied_to_listen:
            raise ConnectionRefused(
                f"the server does not let this user listen to '{prefix}.>', where its answers "
                "come. Grant that, or set NATSPUBSUB_REPLY_PREFIX to what this user may listen to"
            )

    async def on_closed(self) -> None:
        """Hear from nats-py that it has closed the connection."""
        self.lose()

    async def end(self) -> None:
        """Close within ``CLOSE_TIMEOUT`` seconds, whatever state it is in."""
        self.lose()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self.close()
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()


class _Connection:
    """One connection made by nats-py; see ``link.Connection``.

    What arrives for its subscriptions is taken from the socket's reader, before nats-py parses,
    queues and wakes a task for it. Should a later nats-py read otherwise, the callbacks given to
    ``subscribe`` get the messages the long way.
    """

    def __init__(self, client: _Client) -> None:
        self.closed = client.lost
        self._client = client
        self._routes: dict[int, Route] = {}
        self._is_websocket = not hasattr(client._transport, "_io_writer")
        reader = getattr(client._transport, "_io_reader", None)
        if isinstance(reader, asyncio.StreamReader):
            tap = FrameTap(self._routes, reader.feed_data)
            reader.feed_data = tap.feed  # type: ignore[method-assign,assignment]  # of this reader
        self._subscriptions: dict[int, Any] = {}
        self._draining: set[asyncio.Future[None]] = set()

    @property
    def version(self) -> str:
        found = self._client.connected_server_version
        return f"{found.major}.{found.minor}.{found.patch}"

    @property
    def max_payload(self) -> int:
        return self._client.max_payload

    @property
    def unsent(self) -> int:
        writer = getattr(self._client._transport, "_io_writer", None)
        return 0 if writer is None else int(writer.transport.get_write_buffer_size())

    @property
    def servers(self) -> list[str]:
        return [url.geturl() for url in self._client.discovered_servers]

    @property
    def cluster_size(self) -> int:
        return len(self._client._server_info.get("connect_urls") or ()) or 1

    def send(self, frames: Sequence[bytes]) -> None:
        transport = self._client._transport
        if transport is not None and not self.closed.is_set():
            try:
                transport.write(b"".join(frames))
            except RuntimeError:  # uvloop has closed the socket, and nats-py is about to hear of it
                self._client.lose()
                return
            if self._is_websocket:  # sends when it is drained, a socket by itself
                task = asyncio.ensure_future(_drain(transport))
                self._draining.add(task)
                task.add_done_callback(self._draining.discard)

    async def subscribe(self, subject: str, route: Route) -> int:
        async def long_way(message: Msg) -> None:
            try:  # an exception would end nats-py's read loop for good
                route(message.subject, message.reply, message.headers or NO_HEADERS, message.data)
            except (Exception, SystemExit, KeyboardInterrupt):  # noqa: BLE001 - it is logged
                _log.exception(NOT_PASSED_ON, message.subject)

        async with asyncio.timeout(ROUND_TRIP_TIMEOUT):
            subscription = await self._client.subscribe(subject, cb=long_way)
            # nats-py queues the SUB, while send() writes at once: without this, a request could
            # reach the server before the interest in its answer.
            await self._round_trip()
        self._client.check_listens(subject)
        handle: int = subscription._id
        self._routes[handle] = route
        self._subscriptions[handle] = subscription
        return handle

    async def unsubscribe(self, handle: int, *, flush: bool) -> None:
        subscription = self._subscriptions.pop(handle)
        try:
            async with asyncio.timeout(ROUND_TRIP_TIMEOUT):
                if flush:
                    # Tell the server first and keep the route until its answer to a ping has
                    # come: what it had sent by then has arrived.
                    await self._client._send_unsubscribe(handle)
                    await self._round_trip()
                self._routes.pop(handle, None)
                await subscription.unsubscribe()
        finally:
            self._routes.pop(handle, None)

    async def _round_trip(self) -> None:
        """Wait until the server has done what it was told; a ping alone overtakes the queue.

        The caller limits it: of a connection that is lost at this moment nobody tells nats-py,
        which then waits for ever.
        """
        await self._client._flush_pending(force_flush=True)
        await self._client.flush(2)

    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        early_end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        answer = asyncio.ensure_future(self._client.request(subject, payload, timeout=timeout))
        self._client.asked[early_end] = subject
        try:
            await asyncio.wait((answer, early_end), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result().data
            why = early_end.result()
            kind = RequestDenied if why == _NOT_ALLOWED else BrokerError
            raise kind(f"No answer from {subject}: {why}.")
        except nats.errors.NoRespondersError:
            raise LookupError(subject) from None
        except nats.errors.TimeoutError:
            raise TimeoutError from None
        except nats.errors.Error as error:
            raise BrokerError(f"The request to {subject} failed: {error}.") from None
        finally:
            del self._client.asked[early_end]
            answer.cancel()

    async def flush(self, timeout: float) -> None:
        async with asyncio.timeout(timeout):
            await self._client.flush(timeout)  # type: ignore[arg-type]  # takes floats

    async def close(self) -> None:
        await self._client.end()


async def _drain(transport: Any) -> None:
    with contextlib.suppress(Exception):  # a lost connection is found by who reads from it
        await transport.drain()


async def dial(settings: Settings, url: str, on_denied: Callable[[str, str], None]) -> _Connection:
    """Connect to one server.

    :raises ConnectionRefused: wrong credentials, no TLS, a server that is too old.
    :raises OSError: no server, or TimeoutError: one that does not answer.
    """
    client = _Client(on_denied)
    client.needs_tls = _wants_tls(settings, url)
    try:
        async with asyncio.timeout(settings.connect_timeout * 2 + 1):
            await client.connect(
                [url],
                error_cb=client.on_error,
                closed_cb=client.on_closed,
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                ping_interval=PING_INTERVAL,  # type: ignore[arg-type]  # takes floats
                max_outstanding_pings=UNANSWERED_PINGS,
                name=f"{settings.app_name}-{os.getpid()}",
                inbox_prefix=settings.reply_prefix,
                connect_timeout=settings.connect_timeout,  # type: ignore[arg-type]  # takes floats
                **_credentials(settings, url),
            )
        _check_version(client)
    except Exception as error:  # noqa: BLE001 - _dial_error knows what to make of it
        await client.end()
        no_servers = isinstance(error, nats.errors.NoServersError)
        raise _dial_error(client.last_problem if no_servers else error) from None
    except BaseException:
        await client.end()
        raise
    return _Connection(client)


def _check_version(client: Client) -> None:
    version = client.connected_server_version
    if (version.major, version.minor) < OLDEST_SERVER:
        number = f"{version.major}.{version.minor}.{version.patch}"
        raise ConnectionRefused(f"nats-server {number} is too old, 2.10.23 or newer is needed")


def _dial_error(error: Exception | None) -> Exception:
    """Tell what will not get better by itself from what may, and leave out what is secret."""
    text = _text_of(error)
    if isinstance(error, ConnectionRefused):
        return error
    if isinstance(error, TimeoutError):
        return TimeoutError("it does not answer")
    if isinstance(error, ConnectionRefusedError):
        return OSError("nothing listens there")
    if isinstance(error, ssl.SSLEOFError):
        return OSError("it hung up during the TLS handshake")
    if isinstance(error, ssl.SSLError):
        return ConnectionRefused(tls_problem(getattr(error, "verify_message", "") or text))
    if isinstance(error, nats.errors.SecureConnWantedError):
        return ConnectionRefused(
            "it offers no TLS, and TLS is asked for. Set up TLS there; without it nothing is sent"
        )
    if isinstance(error, nats.errors.AuthorizationError) or _BAD_CREDENTIALS.search(text):
        return ConnectionRefused("wrong or missing credentials")
    if error is None or isinstance(error, (OSError, nats.errors.Error, ImportError)):
        return OSError(text)
    # From reading the seed or the credentials file, most likely: its text might quote them.
    return ConnectionRefused(f"signing in failed with {type(error).__name__}, check the key files")


def _text_of(error: Exception | None) -> str:
    # A server may say anything, and this is logged.
    text = printable(str(error or ""))
    text = " ".join(text.removeprefix("nats: ").strip("'\"").split())
    return text or type(error).__name__


def _wants_tls(settings: Settings, url: str) -> bool:
    asked = settings.tls_ca_file or settings.tls_cert_file or settings.tls_hostname
    return asked is not None or urlsplit(url).scheme in ("tls", "wss")


def _credentials(settings: Settings, url: str) -> dict[str, Any]:
    # What the server tells of the rest of its cluster are addresses: no names, no passwords.
    told = urlsplit(url if url in settings.urls else settings.urls[0])
    options: dict[str, Any] = {
        "user": settings.user,
        "password": settings.password,
        "token": settings.token,
        "nkeys_seed": settings.nkey_seed_file,
        "user_credentials": settings.credentials_file,
    }
    if told.username and told.password:
        options |= {"user": unquote(told.username), "password": unquote(told.password)}
    elif told.username:
        options["token"] = unquote(told.username)
    if _wants_tls(settings, url):
        options["tls"] = _tls_context(settings)
        options["tls_hostname"] = settings.tls_hostname or told.hostname
    return {name: value for name, value in options.items() if value is not None}


def _tls_context(settings: Settings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=settings.tls_ca_file)
    if settings.tls_cert_file and settings.tls_key_file:
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
    return context


def check_credentials(settings: Settings) -> None:
    """Check what needs no server: the files exist, and what reads them is installed.

    :raises ConfigurationError: naming the key.
    """
    for key in ("nkey_seed_file", "credentials_file", "tls_ca_file", "tls_cert_file"):
        path = getattr(settings, key)
        if path is not None and not os.access(path, os.R_OK):
            raise ConfigurationError(
                f"NATSPUBSUB_{key.upper()} is {path!r}, which cannot be read.", "Correct the path."
            )
    if any(urlsplit(url).scheme in ("ws", "wss") for url in settings.urls):
        _check_websocket()
    if settings.nkey_seed_file or settings.credentials_file:
        try:
            import nkeys  # noqa: F401
        except ImportError:
            raise ConfigurationError(
                "NKeys and credentials files need the package nkeys.",
                "pip install 'Flask-NatsPubsub[nkeys]'",
            ) from None


def _check_websocket() -> None:
    if importlib.util.find_spec("aiohttp") is None:
        raise ConfigurationError(
            "NATSPUBSUB_URLS has a ws:// or wss:// URL, which needs the package aiohttp.",
            "pip install aiohttp, or use a nats:// or tls:// URL.",
        )


class NatsBroker(JetStreamBroker):
    """The broker of production: NATS JetStream, by way of nats-py.

    :raises ConfigurationError: a file or a package for the credentials is missing.
    """

    def __init__(self, settings: Settings) -> None:
        check_credentials(settings)
        super().__init__(settings, dial)
