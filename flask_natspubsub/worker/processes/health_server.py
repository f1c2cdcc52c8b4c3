"""The worker's own health endpoint: the paths of the health blueprint, without an application.

What it tells are names, process ids and ages; nothing that comes from a message.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from ...text import get_logger

_log = get_logger("flask_natspubsub.health")

#: How long a client may take to say what it wants; seconds.
CLIENT_TIMEOUT = 5.0

#: Says whether the process lives, and of each check its ``status``, ``failed`` and details.
Look = Callable[[], tuple[bool, Mapping[str, Mapping[str, Any]]]]


class HealthServer:
    """Answers ``/health/``, ``/health/live``, ``/health/ready`` and ``/health/detailed``.

    It runs in threads of its own, from ``with`` to its end.

    :param look: asked at each request, in the thread that serves it.
    :raises OSError: the port is taken, or may not be used.
    """

    def __init__(self, host: str, port: int, look: Look) -> None:
        self._server = _Server((host, port), look)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="natspubsub-health", daemon=True
        )

    @property
    def url(self) -> str:
        """Where it answers, with the port that was found if 0 was asked for."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}/health/"

    def __enter__(self) -> HealthServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], look: Look) -> None:
        self.look = look
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own asks the DNS for the name, and may wait

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a health request failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = CLIENT_TIMEOUT
    server_version = "Flask-NatsPubsub"
    sys_version = ""

    def do_GET(self) -> None:
        live, checks = self.server.look()
        failed = [name for name, row in checks.items() if row["status"] != "ok"]
        path = self.path.partition("?")[0].rstrip("/")
        if path == "/health/live":
            self._answer(live)
        elif path == "/health/ready":
            self._answer(live and not failed, failed=failed)
        elif path == "/health":
            statuses = {name: row["status"] for name, row in checks.items()}
            self._answer(live and not failed, checks=statuses)
        elif path == "/health/detailed":
            self._answer(live and not failed, checks=checks)
        else:
            self._send(404, {"status": "failed", "error": "Try /health/live or /health/ready."})

    def _answer(self, well: bool, **body: Any) -> None:
        self._send(200 if well else 503, {"status": "ok" if well else "failed", **body})

    def _send(self, code: int, body: Mapping[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)
