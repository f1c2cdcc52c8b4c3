"""What stands between the link and nats-py, where no server is needed to see it."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import nats.errors
import pytest

from flask_natspubsub.brokers.jetstream.client import NatsConnection, dial_error
from flask_natspubsub.brokers.jetstream.connection import ConnectionRefused
from flask_natspubsub.brokers.jetstream.credentials import credentials_for
from flask_natspubsub.brokers.wire import frame
from flask_natspubsub.config.settings import Settings


class WebSocket:
    """A transport that sends when it is drained, as that of nats-py for WebSockets."""

    def __init__(self) -> None:
        self.waiting = b""
        self.sent = b""

    def write(self, data: bytes) -> None:
        self.waiting += data

    async def drain(self) -> None:
        self.sent, self.waiting = self.sent + self.waiting, b""


def connection_over(transport: Any) -> NatsConnection:
    connection = NatsConnection(Settings(), "nats://nowhere", lambda subject, why: None)
    connection.use(transport)
    return connection


def test_over_a_websocket_messages_are_sent_at_once_too() -> None:
    async def main() -> WebSocket:
        transport = WebSocket()
        connection = connection_over(transport)
        connection.send([frame("a", b"1", "r"), frame("b", b"2", "r")])
        assert connection.unsent == 28
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert connection.unsent == 0
        return transport

    transport = asyncio.run(main())

    assert transport.sent == b"PUB a r 1\r\n1\r\nPUB b r 1\r\n2\r\n"
    assert transport.waiting == b""


class ClosedSocket:
    """A transport of uvloop whose socket has broken, before nats-py has heard of it."""

    def write(self, data: bytes) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport>; the handler is closed")


def test_writing_to_a_socket_that_has_just_broken_loses_the_connection_and_nothing_else() -> None:
    async def main() -> bool:
        connection = connection_over(ClosedSocket())
        connection.send([frame("a", b"1", "r")])
        return connection.closed.is_set()

    assert asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "refused", "text"),
    [
        (ConnectionRefusedError(111, "Connect call failed"), False, "nothing listens there"),
        (TimeoutError(), False, "it does not answer"),
        (OSError("no route to host"), False, "no route to host"),
        (ssl.SSLEOFError(8, "EOF"), False, "it hung up during the TLS handshake"),
        (ssl.SSLError(1, "bad things"), True, "TLS failed, bad things"),
        (nats.errors.SecureConnWantedError(), True, "it offers no TLS, and TLS is asked for"),
        (nats.errors.AuthorizationError(), True, "wrong or missing credentials"),
        (nats.errors.Error("nats: 'Authorization Violation'"), True, "wrong or missing"),
        (nats.errors.Error("nats: 'User Authentication Expired'"), True, "wrong or missing"),
        (nats.errors.Error("nats: 'Authentication Timeout'"), False, "Authentication Timeout"),
        (nats.errors.Error("nats: maximum connections exceeded"), False, "maximum connections"),
        (ConnectionRefused("too old"), True, "too old"),
        (ValueError("seed SUAMSECRET is bad"), True, "signing in failed with ValueError"),
        (None, False, ""),
    ],
)
def test_what_may_pass_by_itself_is_told_from_what_will_not(
    error: Exception | None, refused: bool, text: str
) -> None:
    told = dial_error(error)

    assert isinstance(told, ConnectionRefused) is refused
    assert isinstance(told, OSError) is not refused
    assert text in str(told)
    assert "SECRET" not in str(told)


def test_a_server_that_another_one_told_of_is_trusted_as_that_one_is() -> None:
    settings = Settings(urls=("tls://us%40er:pa%2Fss@nats.example:4222",))

    told = credentials_for(settings, "tls://10.0.0.2:4222")

    assert (told["user"], told["password"]) == ("us@er", "pa/ss")
    assert told["tls_hostname"] == "nats.example"


def test_the_credentials_of_one_server_are_not_given_to_another() -> None:
    settings = Settings(urls=("nats://secret@one", "nats://two"))

    assert credentials_for(settings, "nats://one") == {"token": "secret"}
    assert credentials_for(settings, "nats://two") == {}
