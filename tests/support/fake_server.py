"""Servers that are not nats-server: they greet as told and note what they are sent."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

from tests.support.managed import Managed


class FakeServer(Managed):
    """Accepts connections, sends one line, answers PING, and records.

    :param info: what the INFO line says; or bytes, sent as they are.
    """

    def __init__(self, info: dict[str, Any] | bytes) -> None:
        if isinstance(info, dict):
            defaults = {
                "server_id": "fake",
                "version": "2.11.0",
                "headers": True,
                "max_payload": 1024 * 1024,
            }
            info = b"INFO " + json.dumps(defaults | info).encode() + b"\r\n"
        self._greeting = info
        self.received = bytearray()
        self.accepted = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="fake server")]

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(5)
        self._listener.close()
        for one in self._sockets:
            _shut(one)
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._sockets.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), name="fake server")
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.sendall(self._greeting)
                while data := connection.recv(4096):
                    self.received += data
                    if b"PING\r\n" in data:
                        connection.sendall(b"PONG\r\n")
            except OSError:
                return


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
