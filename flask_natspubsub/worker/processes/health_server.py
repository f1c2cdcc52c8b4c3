"""The worker's own health endpoint: the pages of the health blueprint, without an application.

Its bodies have names, process ids and ages, and nothing that comes from a message.

It is ``http.server`` and not Werkzeug's: that one ends the process when the port is taken, asks
the DNS for its own name, and reads on what a client sends after it has been answered. To work
around these took as many lines.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from ...observability.health import HEADERS, PAGES, Report, respond
from ...text import get_logger

_log = get_logger("flask_natspubsub.health")

#: Seconds that a client may take to send its request.
CLIENT_TIMEOUT = 5.0
PREFIX = "/health"

#: Returns whether the process lives, and a row for each check.
Look = Callable[[], Report]


class HealthServer:
    """Answers ``/health/``, ``/health/live``, ``/health/ready`` and ``/health/detailed``.

    It runs in threads of its own while its ``with`` block does.

    :param look: called for each request, in the thread that serves it.
    :raises OSError: the port is taken, or may not be used.
    """

    def __init__(self, host: str, port: int, look: Look) -> None:
        self._server = _Server((host, port), look)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="natspubsub-health", daemon=True
        )

    @property
    def url(self) -> str:
        """The address of the summary page, with the port that the system chose for 0."""
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
        path = self.path.partition("?")[0].rstrip("/")
        page = PAGES.get(path.removeprefix(PREFIX) or "/") if path.startswith(PREFIX) else None
        if page is None:
            self._send(404, {"status": "failed", "error": "Try /health/live or /health/ready."})
        else:
            self._send(*respond(page, lambda: self.server.look()[0], self._checks))

    def _checks(self) -> Report:
        """Return whether the process lives and no check fails, and the rows."""
        live, rows = self.server.look()
        return live and all(row["status"] == "ok" for row in rows.values()), rows

    def _send(self, code: int, body: Mapping[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)
