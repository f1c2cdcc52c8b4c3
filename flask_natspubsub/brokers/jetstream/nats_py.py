"""nats-py's private names: this module holds all of them, and nothing else touches one.

nats-py does the handshake, TLS, NKeys, WebSockets and the liveness pings. Its public API does not
let a caller write frames of its own, take messages from the socket, insist on TLS before the
credentials are sent, or learn at once that a connection is lost. ``check`` runs before the first
connection: a nats-py without a name of ``NEEDED`` is refused, since nothing replaces it. Without
one of ``HELPFUL`` the public API does the same, only more slowly.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.aio.transport import Transport

from ...errors import ConfigurationError

#: The version of nats-py that this module was written for and is tested with.
KNOWN_TO_WORK = "2.16"
#: Attributes of a client that nothing replaces, with the parameters of the methods among them.
NEEDED: dict[str, list[str]] = {
    "_transport": [],
    "_process_info": ["info", "initial_connection"],
    "_process_op_err": ["e"],
}
#: What is lost without each of the others.
HELPFUL = {
    "_pending": "a connection that is lost while it has bytes to send takes CLOSE_TIMEOUT to close",
    "_pending_data_size": "the same",
    "_io_reader": "messages take nats-py's way: parsed, queued, and a task woken for each",
    "_io_writer": "each write is followed by a drain, and a lost socket is closed, not aborted",
    "_id": "messages take nats-py's way, as without _io_reader",
}


def check() -> None:
    """Refuse a nats-py that lacks what nothing replaces.

    :raises ConfigurationError: it names the attribute, the version found and one that works.
    """
    found = Client()
    for name, parameters in NEEDED.items():
        member = getattr(found, name, check)
        if member is check or (parameters and _parameters_of(member) != parameters):
            raise ConfigurationError(
                f"nats-py {version('nats-py')} cannot be used: its client has no "
                f"{name}{_signature(parameters)}.",
                f"Install a version that is known to work: pip install 'nats-py=={KNOWN_TO_WORK}.*'"
                ", or a newer Flask-NatsPubsub.",
            )


def _parameters_of(method: Any) -> list[str]:
    return list(inspect.signature(method).parameters)


def _signature(parameters: list[str]) -> str:
    return f"({', '.join(parameters)})" if parameters else ""


class HookedClient(Client):
    """nats-py's client, with a hook at the greeting and one at the loss of the connection.

    :param needs_tls: whether a server that offers no TLS is refused before it gets credentials.
    :param on_lost: called at once when the connection is lost; may be called more than once.
    """

    def __init__(self, needs_tls: bool, on_lost: Callable[[], None]) -> None:
        super().__init__()
        #: How many servers of the cluster take clients; 0 until the server has greeted.
        self.cluster_size = 0
        self._needs_tls = needs_tls
        self._on_lost = on_lost

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Insist on TLS before the CONNECT that carries the credentials is sent."""
        if initial_connection:
            self.cluster_size = len(info.get("connect_urls") or ()) or 1
        if self._needs_tls and initial_connection:
            if not (info.get("tls_required") or info.get("tls_available")):
                raise nats.errors.SecureConnWantedError
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)

    async def _process_op_err(self, e: Exception) -> None:
        """Report the loss at once; nats-py's ``closed_cb`` reports it only after it has closed."""
        self.drop_pending()
        self._on_lost()
        await super()._process_op_err(e)

    def drop_pending(self) -> None:
        """Forget what is buffered: a close waits for the other side to read it."""
        self._pending, self._pending_data_size = [], 0


def transport_of(client: Client) -> Transport | None:
    """Return what carries the bytes, once there is a connection."""
    return client._transport


def reader_of(transport: Transport | None) -> asyncio.StreamReader | None:
    """Return the stream that a TCP transport reads from; a WebSocket has none."""
    reader = getattr(transport, "_io_reader", None)
    return reader if isinstance(reader, asyncio.StreamReader) else None


def writer_of(transport: Transport | None) -> asyncio.StreamWriter | None:
    """Return the stream that a TCP transport writes to; a WebSocket has none."""
    writer = getattr(transport, "_io_writer", None)
    return writer if isinstance(writer, asyncio.StreamWriter) else None


def id_of(subscription: Subscription) -> int | None:
    """Return the id by which the server names a subscription in its messages."""
    found: int | None = getattr(subscription, "_id", None)
    return found
