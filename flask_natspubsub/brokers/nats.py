"""NATS JetStream behind the port: the only module that imports ``nats``.

nats-py speaks the protocol over one connection; *when* there is a new connection is decided
by ``Link``, since nats-py gives up after a while, waits a fixed time and forgets pulls.
Nothing starts before the first call, and a forked child starts afresh.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from ..errors import BrokerError, ConfigurationError
from ..settings import Settings
from .link import ConnectionRefused
from .session import JetStreamBroker
from .wire import NO_HEADERS, Outgoing, Route, frame, parse_headers

_log = logging.getLogger("flask_natspubsub.broker")

OLDEST_SERVER = (2, 10)
PING_INTERVAL = 10
_DENIED = re.compile(r"permissions violation for publish to [\"'](?P<subject>[^\"']+)[\"']", re.I)


class _Client(Client):
    """nats-py, with a shorter way in for the subscriptions of ``_Connection``.

    nats-py parses each message's headers, queues it and wakes a task for it. Overriding this
    one method takes routed messages straight from the parser. Should a later nats-py no longer
    call it, the callbacks given to ``subscribe`` get the messages the long way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.routes: dict[int, Route] = {}
        self.needs_tls = False

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        route = self.routes.get(sid)
        if route is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        parsed = parse_headers(headers) if headers else NO_HEADERS
        _pass_on(route, subject.decode(), reply.decode(), parsed, bytes(data))

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Insist on TLS before the CONNECT that carries the credentials is sent."""
        if self.needs_tls and initial_connection:
            if not (info.get("tls_required") or info.get("tls_available")):
                raise nats.errors.SecureConnWantedError
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)


def _pass_on(
    route: Route, subject: str, reply: str, headers: Mapping[str, str], data: bytes
) -> None:
    """Call a route; an exception would end nats-py's read loop for good."""
    try:
        route(subject, reply, headers, data)
    except Exception:  # noqa: BLE001 - whatever it is, it is logged
        _log.exception("a message on %r could not be passed on", subject)


class _Connection:
    """One connection made by nats-py; see ``link.Connection``."""

    def __init__(self, client: _Client, closed: asyncio.Event) -> None:
        self.closed = closed
        self._client = client
        self._subscriptions: dict[int, Any] = {}

    @property
    def max_payload(self) -> int:
        return self._client.max_payload

    @property
    def servers(self) -> list[str]:
        return [url.geturl() for url in self._client.discovered_servers]

    def send(self, outgoing: Sequence[Outgoing]) -> None:
        transport = getattr(self._client, "_transport", None)
        if transport is not None and self._client.is_connected:
            transport.write(b"".join(map(frame, outgoing)))

    async def subscribe(self, subject: str, route: Route) -> int:
        async def long_way(message: Msg) -> None:
            _pass_on(
                route, message.subject, message.reply, message.headers or NO_HEADERS, message.data
            )

        subscription = await self._client.subscribe(subject, cb=long_way)
        # nats-py queues the SUB, while send() writes at once: without this, a request could
        # reach the server before the interest in its answer.
        await self._client.flush(2)
        handle: int = subscription._id
        self._client.routes[handle] = route
        self._subscriptions[handle] = subscription
        return handle

    async def unsubscribe(self, handle: int, *, flush: bool) -> None:
        subscription = self._subscriptions.pop(handle)
        if flush:
            # Tell the server first and keep the route until its answer to a ping has come:
            # what it had sent by then has arrived.
            await self._client._send_unsubscribe(handle)
            await self._client.flush(2)
        self._client.routes.pop(handle, None)
        await subscription.unsubscribe()

    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        try:
            return (await self._client.request(subject, payload, timeout=timeout)).data
        except nats.errors.NoRespondersError:
            raise LookupError(subject) from None
        except nats.errors.TimeoutError:
            raise TimeoutError from None
        except nats.errors.Error as error:
            raise BrokerError(f"The request to {subject} failed: {error}.") from None

    async def flush(self, timeout: float) -> None:
        await self._client.flush(max(1, round(timeout)))

    async def close(self) -> None:
        await self._client.close()
        self.closed.set()


async def dial(settings: Settings, url: str, on_denied: Callable[[str, str], None]) -> _Connection:
    """Connect to one server.

    :raises ConnectionRefused: wrong credentials, no TLS, a server that is too old.
    :raises OSError: no server, or TimeoutError: one that does not answer.
    """
    client, closed, errors = _Client(), asyncio.Event(), []
    client.needs_tls = urlsplit(url).scheme in ("tls", "wss") or settings.tls_ca_file is not None

    async def on_error(error: Exception) -> None:
        errors.append(error)
        del errors[:-1]
        denied = _DENIED.search(str(error))
        if denied:
            on_denied(denied["subject"], str(error))

    async def on_closed() -> None:
        closed.set()

    try:
        async with asyncio.timeout(settings.connect_timeout * 2 + 1):
            await client.connect(
                [url],
                error_cb=on_error,
                closed_cb=on_closed,
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                ping_interval=PING_INTERVAL,
                max_outstanding_pings=2,
                name=f"{settings.app_name}-{os.getpid()}",
                connect_timeout=settings.connect_timeout,  # type: ignore[arg-type]  # takes floats
                **_credentials(settings, url),
            )
    except (nats.errors.Error, ssl.SSLError) as error:
        cause = errors[-1] if errors and isinstance(error, nats.errors.NoServersError) else error
        await client.close()
        raise _dial_error(cause) from None
    except TimeoutError:
        await client.close()
        raise TimeoutError("it does not answer") from None
    version = client.connected_server_version
    if (version.major, version.minor) < OLDEST_SERVER:
        await client.close()
        raise ConnectionRefused(f"nats-server {version} is too old, 2.10.23 or newer is needed")
    return _Connection(client, closed)


def _dial_error(error: Exception) -> Exception:
    text = " ".join(str(error).removeprefix("nats: ").strip("'\"").split())
    if isinstance(error, ssl.SSLError):
        return ConnectionRefused(f"TLS failed, {getattr(error, 'verify_message', '') or text}")
    if isinstance(error, nats.errors.SecureConnWantedError):
        return ConnectionRefused("it offers no TLS, and TLS is asked for")
    if isinstance(error, nats.errors.AuthorizationError) or "authoriz" in text.lower():
        return ConnectionRefused("wrong or missing credentials")
    if "maximum connections" in text.lower() or not isinstance(error, nats.errors.Error):
        return OSError(text or type(error).__name__)
    return OSError(text)


def _credentials(settings: Settings, url: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "user": settings.user,
        "password": settings.password,
        "token": settings.token,
        "nkeys_seed": settings.nkey_seed_file,
        "user_credentials": settings.credentials_file,
    }
    if settings.tls_ca_file or settings.tls_cert_file or urlsplit(url).scheme in ("tls", "wss"):
        options["tls"] = _tls_context(settings)
        options["tls_hostname"] = settings.tls_hostname or urlsplit(url).hostname
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
    if settings.nkey_seed_file or settings.credentials_file:
        try:
            import nkeys  # noqa: F401
        except ImportError:
            raise ConfigurationError(
                "NKeys and credentials files need the package nkeys.",
                "pip install 'Flask-NatsPubsub[nkeys]'",
            ) from None


class NatsBroker(JetStreamBroker):
    """The broker of production: NATS JetStream, by way of nats-py.

    :raises ConfigurationError: a file or a package for the credentials is missing.
    """

    def __init__(self, settings: Settings) -> None:
        check_credentials(settings)
        super().__init__(settings, dial)
