"""One NATS connection, made and served by nats-py, and the broker that uses it.

nats-py speaks the protocol over one connection; *when* there is a new connection is decided
by ``Link``, since nats-py gives up after a while, waits a fixed time and forgets pulls. What is
awaited of nats-py here may hang: the methods have no deadlines, ``Link`` puts one on each.
Nothing starts before the first call, and a forked child starts afresh.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from ...config.settings import Settings
from ...errors import BrokerError, RequestDenied
from ...text import get_logger, printable
from ..wire import NO_HEADERS, NOT_PASSED_ON, FrameTap, Route
from . import nats_py
from .broker import JetStreamBroker
from .connection import ConnectionRefused, within
from .credentials import check_credentials, credentials_for, tls_problem, wants_tls

if TYPE_CHECKING:
    from nats.aio.transport import Transport

_log = get_logger("flask_natspubsub.broker")

_BAD_CREDENTIALS = re.compile(r"authoriz|authentication (?!timeout)", re.I)
OLDEST_SERVER = (2, 10)
#: Seconds between two pings. The third that is not answered ends the connection: one that has
#: gone dead is given up after 27 seconds at most.
PING_INTERVAL = 9.0
UNANSWERED_PINGS = 2
#: Seconds that closing may take before the socket is aborted.
CLOSE_TIMEOUT = 1.0
#: Seconds after which nats-py may give up a ping: by then it has given up the connection.
PING_LIMIT = 60
#: Seconds between two looks whether what was queued has been written, after a first one at once.
WRITE_POLL = 0.005
_DENIED = re.compile(
    r"permissions violation(?: for (?P<kind>publish|subscription) to [\"'](?P<subject>[^\"']+))?",
    re.I,
)


class NatsConnection:
    """One connection made by nats-py; see ``Connection``.

    Messages for its subscriptions are taken from the socket's reader, before nats-py parses,
    queues and wakes a task for each. Where there is no such reader (a WebSocket, a nats-py that
    reads otherwise), the callbacks given to nats-py pass them on.

    :param on_denied: called with the subject that this user may not publish to, or an empty
        string, and the server's reason.
    """

    def __init__(self, settings: Settings, url: str, on_denied: Callable[[str, str], None]) -> None:
        self.closed = asyncio.Event()
        #: What nats-py reported last: a failed handshake says why only here.
        self.last_problem: Exception | None = None
        self._settings = settings
        self._url = url
        self._on_denied = on_denied
        self._client = nats_py.HookedClient(wants_tls(settings, url), self._lose)
        self._transport: Transport | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._routes: dict[int, Route] = {}
        self._subscriptions: dict[int, Subscription] = {}
        self._number = 0
        self._denied_subscriptions: set[str] = set()
        #: The subject of each request under way, by the future that ends it as denied.
        self._requests: dict[asyncio.Future[None], str] = {}
        self._is_tapped = False
        self._pings: set[asyncio.Future[None]] = set()
        self._draining: set[asyncio.Future[None]] = set()
        self._undrained = 0

    # --- opening and closing

    async def open(self) -> None:
        """Connect and sign in.

        :raises ConnectionRefused: the server is too old.
        """
        settings, client = self._settings, self._client
        await client.connect(
            [self._url],
            error_cb=self._on_error,
            closed_cb=self._on_closed,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            ping_interval=PING_INTERVAL,  # type: ignore[arg-type]  # takes floats
            max_outstanding_pings=UNANSWERED_PINGS,
            name=f"{settings.app_name}-{os.getpid()}",
            inbox_prefix=settings.reply_prefix,
            connect_timeout=settings.connect_timeout,  # type: ignore[arg-type]  # takes floats
            **credentials_for(settings, self._url),
        )
        found = client.connected_server_version
        if (found.major, found.minor) < OLDEST_SERVER:
            raise ConnectionRefused(
                f"nats-server {self.version} is too old, 2.10.23 or newer is needed"
            )
        self.use(nats_py.transport_of(client))

    @property
    def has_hung_up(self) -> bool:
        """Whether the server has ended the connection; to be asked before ``close``."""
        transport = nats_py.transport_of(self._client)
        writer = nats_py.writer_of(transport)
        is_closing = writer is not None and writer.is_closing()  # it was reset
        return is_closing or (transport is not None and transport.at_eof())

    def use(self, transport: Transport | None) -> None:
        """Write to ``transport``, and take messages from its reader if it has one."""
        self._transport = transport
        self._writer = nats_py.writer_of(transport)
        reader = nats_py.reader_of(transport)
        if reader is not None:
            tap = FrameTap(self._routes, reader.feed_data)
            self._is_tapped = True
            reader.feed_data = tap.feed  # type: ignore[method-assign,assignment]  # of this one

    async def close(self) -> None:
        """Close within ``CLOSE_TIMEOUT`` seconds, whatever state it is in."""
        self._lose()
        self._client.drop_pending()
        with contextlib.suppress(Exception):
            await within(CLOSE_TIMEOUT, self._client.close())
        for ping in self._pings:
            ping.cancel()
        transport = nats_py.transport_of(self._client)
        writer = nats_py.writer_of(transport)
        with contextlib.suppress(Exception):
            if writer is not None:
                writer.transport.abort()
            elif transport is not None:
                transport.close()  # type: ignore[no-untyped-call]  # of nats-py

    def _lose(self) -> None:
        self.closed.set()

    async def _on_closed(self) -> None:
        self._lose()

    # --- what the server says of itself

    @property
    def version(self) -> str:  # noqa: D102 - documented in Connection, as all below
        found = self._client.connected_server_version
        return f"{found.major}.{found.minor}.{found.patch}"

    @property
    def max_payload(self) -> int:  # noqa: D102
        return self._client.max_payload

    @property
    def servers(self) -> list[str]:  # noqa: D102
        return [url.geturl() for url in self._client.discovered_servers]

    @property
    def cluster_size(self) -> int:  # noqa: D102
        return self._client.cluster_size

    # --- sending

    @property
    def unsent(self) -> int:  # noqa: D102
        if self._writer is None:
            return self._undrained
        return int(self._writer.transport.get_write_buffer_size())

    def send(self, frames: Sequence[bytes]) -> None:  # noqa: D102
        if self._transport is not None and not self.closed.is_set():
            data = b"".join(frames)
            try:
                self._transport.write(data)
            except RuntimeError:  # uvloop has closed the socket, and nats-py is about to hear of it
                self._client.drop_pending()
                self._lose()
                return
            if self._writer is None:  # sends when it is drained, a socket by itself
                self._drain_soon(self._transport, len(data))

    def _drain_soon(self, transport: Transport, size: int) -> None:
        self._undrained += size
        task = asyncio.ensure_future(_drain(transport))
        self._draining.add(task)

        def drained(_: asyncio.Future[None]) -> None:
            self._draining.discard(task)
            self._undrained -= size

        task.add_done_callback(drained)

    # --- subscribing

    async def subscribe(self, subject: str, route: Route) -> int:  # noqa: D102
        async def pass_on(message: Msg) -> None:
            try:  # an exception would end nats-py's read loop for good
                route(message.subject, message.reply, message.headers or NO_HEADERS, message.data)
            except (Exception, SystemExit, KeyboardInterrupt):  # noqa: BLE001 - it is logged
                _log.exception(NOT_PASSED_ON, message.subject)

        subscription = await self._client.subscribe(subject, cb=pass_on)
        # nats-py queues the SUB, while send() writes at once: without this, a request could
        # reach the server before the interest in its answer.
        await self._round_trip()
        self._check_replies_come(subject)
        self._number += 1
        handle = nats_py.id_of(subscription)
        if handle is None:
            handle = -self._number  # no message has this id: all of them take nats-py's way
        self._routes[handle] = route
        self._subscriptions[handle] = subscription
        return handle

    async def unsubscribe(self, handle: int, *, flush: bool) -> None:  # noqa: D102
        subscription = self._subscriptions.pop(handle)
        try:
            if flush and not (self._is_tapped and handle > 0):
                draining = subscription.drain()  # type: ignore[no-untyped-call]  # of nats-py
                await asyncio.shield(asyncio.ensure_future(draining))
            else:
                await subscription.unsubscribe()
            if flush:
                # The route stays until the server has answered a ping: what it had sent before
                # has arrived then.
                await self._round_trip()
        finally:
            self._routes.pop(handle, None)

    async def _round_trip(self) -> None:
        """Wait until the server has processed the queued commands.

        nats-py writes a ping at once and queued commands in a task: they must be written first.
        """
        await asyncio.sleep(0)
        while (  # noqa: ASYNC110 - nats-py has no event for it
            self._client.pending_data_size and not self.closed.is_set()
        ):
            await asyncio.sleep(WRITE_POLL)
        await self.flush()

    async def flush(self) -> None:  # noqa: D102
        # A ping is never given up: nats-py stops reading when its answer comes after all.
        ping = asyncio.ensure_future(self._client.flush(PING_LIMIT))
        self._pings.add(ping)
        ping.add_done_callback(self._pings.discard)
        await asyncio.shield(ping)

    # --- asking

    async def request(  # noqa: D102
        self, subject: str, payload: bytes, timeout: float
    ) -> bytes:
        denied: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        answer = asyncio.ensure_future(self._client.request(subject, payload, timeout=timeout))
        self._requests[denied] = subject.lower()
        try:
            await asyncio.wait((answer, denied), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise RequestDenied(
                    f"No answer from {subject}: the server does not let this user send to it."
                )
            return answer.result().data
        except nats.errors.NoRespondersError:
            raise LookupError(subject) from None
        except nats.errors.TimeoutError:
            raise TimeoutError from None
        except nats.errors.Error as error:
            raise BrokerError(f"The request to {subject} failed: {error}.") from None
        finally:
            del self._requests[denied]
            answer.cancel()

    # --- what the server refuses

    async def _on_error(self, error: Exception) -> None:
        """Note what nats-py reports; a refused publish is reported here and nowhere else."""
        self.last_problem = error
        found = _DENIED.search(str(error))
        if found is None:
            return
        subject = (found["subject"] or "").lower()
        if (found["kind"] or "").lower() == "subscription":
            self._denied_subscriptions.add(subject)
            subject = ""
        for denied, asked in self._requests.items():
            if asked == subject and not denied.done():
                denied.set_result(None)
        self._on_denied(subject, text_of(error))

    def _check_replies_come(self, subject: str) -> None:
        """Refuse a connection on which replies cannot come.

        A process can do without wake-ups of the relay, say; it cannot without acknowledgements.
        """
        prefix = self._settings.reply_prefix
        if subject.startswith(f"{prefix}.") and subject.lower() in self._denied_subscriptions:
            raise ConnectionRefused(
                f"the server does not let this user listen to '{prefix}.>', where its answers "
                "come. Grant that, or set NATSPUBSUB_REPLY_PREFIX to what this user may listen to"
            )


async def _drain(transport: Any) -> None:
    with contextlib.suppress(Exception):  # a lost connection is found by who reads from it
        await transport.drain()


async def dial(
    settings: Settings, url: str, on_denied: Callable[[str, str], None]
) -> NatsConnection:
    """Connect to one server.

    :raises ConnectionRefused: wrong credentials, no TLS, a server that is too old.
    :raises OSError: no server, or TimeoutError: one that does not answer.
    """
    connection = NatsConnection(settings, url, on_denied)
    try:
        await connection.open()
    except Exception as error:  # noqa: BLE001 - dial_error knows what to make of it
        hung_up = connection.has_hung_up
        await connection.close()
        no_servers = isinstance(error, nats.errors.NoServersError)
        problem = connection.last_problem if no_servers else error
        raise dial_error(problem, hung_up=hung_up) from None
    except BaseException:
        await connection.close()
        raise
    return connection


def dial_error(error: Exception | None, *, hung_up: bool = False) -> Exception:
    """Tell what will not get better by itself from what may, and leave out what is secret.

    :param hung_up: whether the server has ended the connection: nats-py may have failed at half a
        line, or uvloop at writing to a socket that was reset.
    """
    text = text_of(error)
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
    if hung_up:
        return OSError("it hung up during the handshake")
    # From reading the seed or the credentials file, most likely: its text might quote them.
    return ConnectionRefused(f"signing in failed with {type(error).__name__}, check the key files")


def text_of(error: Exception | None) -> str:
    """Return what nats-py or the server says, which may be anything, as one printable line."""
    text = printable(str(error or ""))
    text = " ".join(text.removeprefix("nats: ").strip("'\"").split())
    return text or type(error).__name__


class NatsBroker(JetStreamBroker):
    """The broker of production: NATS JetStream, by way of nats-py.

    :raises ConfigurationError: a file or a package for the credentials is missing, or this
        version of nats-py cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        nats_py.check()
        check_credentials(settings)
        super().__init__(settings, dial)
