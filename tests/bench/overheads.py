"""What the extension costs beside its work: latency, hooks, import, memory, web requests."""

from __future__ import annotations

import itertools
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_natspubsub import NatsPubsub
from tests.support.databases import use_wal
from tests.support.waiting import eventually

from .harness import Comparison, Variant, measure
from .peers import per_second

MESSAGES = 200
REQUESTS = 4_000
WEB_REQUESTS = 1_000
IMPORTS = 5
ONE_PROCESS = "site, relay and worker in one process"
MEMORY = Path(__file__).with_name("memory.py")


def comparisons(url: str, rounds: int) -> list[Comparison]:
    """Measure times and sizes; here smaller is better."""
    with tempfile.TemporaryDirectory() as folder, _Web(url) as web:
        shop = _Shop(url, Path(folder))
        try:
            return measure(list(_pairs(url, shop, web)), rounds)
        finally:
            shop.close()


def _pairs(url: str, shop: _Shop, web: _Web) -> Iterator[Comparison]:
    direct = Variant("direct publish to handler, p50, ms", shop.latency(outbox=False, at=0.5))
    p50 = Variant("commit to handler, p50, ms", shop.latency(outbox=True, at=0.5))
    p99 = Variant("commit to handler, p99, ms", shop.latency(outbox=True, at=0.99))
    yield Comparison(p50, direct, 4.5, at_most=True, differs=ONE_PROCESS)
    yield Comparison(p99, p50, differs=ONE_PROCESS)
    yield Comparison(
        Variant("empty request with the hooks, us", _empty_request(url)),
        Variant("without the extension, us", _empty_request(None)),
        1.10,
        at_most=True,
        differs="a request that does nothing",
    )
    yield Comparison(
        Variant("import flask_natspubsub, ms of CPU", lambda: _import("flask_natspubsub")),
        Variant("import flask, ms of CPU", lambda: _import("flask")),
        1.12,
        at_most=True,
    )
    yield Comparison(
        Variant("gthread: requests that publish", web.requests("/publish")),
        Variant("gthread: requests that do not", web.requests("/nothing")),
    )
    flask = Variant("memory of a Flask process, MB", lambda: _memory(url, "flask"))
    for state in ("idle", "published", "worker"):
        name = f"memory with the extension, {state}, MB"
        yield Comparison(Variant(name, lambda state=state: _memory(url, state)), flask)  # type: ignore[misc]


class _Shop:
    """A site with a worker and a relay in one process."""

    def __init__(self, url: str, folder: Path) -> None:
        self.app = Flask("latency")
        self.app.config.update(
            SQLALCHEMY_DATABASE_URI=f"sqlite:///{folder / 'latency'}.db",
            NATSPUBSUB_URLS=url,
            NATSPUBSUB_ENV="latency",
        )
        self.db = SQLAlchemy(self.app)
        self.pubsub = NatsPubsub(self.app, self.db)
        self._arrived = threading.Event()
        self._at = 0.0

        @self.pubsub.subscriber("order.created")
        def handle(message: dict[str, Any]) -> None:
            self._at = time.perf_counter()
            self._arrived.set()

        with self.app.app_context():
            use_wal(self.db.engine)
            self.db.create_all()
            self.worker = self.pubsub.run_worker()

    def latency(self, *, outbox: bool, at: float) -> Callable[[], float]:
        """Return a measure of the milliseconds from the commit, or the publish, to the handler."""

        def run() -> float:
            with self.app.app_context():
                times = sorted(self._once(outbox=outbox) for _ in range(MESSAGES))
            return times[int(at * len(times))] * 1000

        return run

    def _once(self, *, outbox: bool) -> float:
        self._arrived.clear()
        began = time.perf_counter()
        self.pubsub.publish("order.created", {"n": 1}, outbox=outbox)
        self.db.session.commit()
        if not self._arrived.wait(30):
            raise TimeoutError("the message did not arrive")
        return self._at - began

    def close(self) -> None:
        self.worker.stop()
        self.pubsub.shutdown()
        with self.app.app_context():
            self.db.engine.dispose()


def _empty_request(url: str | None) -> Callable[[], float]:
    app = Flask("empty")
    if url is not None:
        app.config.update(NATSPUBSUB_URLS=url)
        NatsPubsub(app)
    app.add_url_rule("/", "nothing", lambda: "")
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/",
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.url_scheme": "http",
    }

    def one() -> None:
        for part in app.wsgi_app(dict(environ), lambda *_: None):
            assert part == b""

    def run() -> float:
        for _ in range(100):
            one()
        return 1e6 / per_second(REQUESTS, lambda: [one() for _ in range(REQUESTS)])

    return run


def _import(module: str) -> float:
    """Import in fresh interpreters; the processor's time, which other processes do not add to."""
    # Compiled, as pip leaves what it installs.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def one() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    one()
    return statistics.median(one() for _ in range(IMPORTS)) * 1000


def _memory(url: str, state: str) -> float:
    command = [sys.executable, str(MEMORY), url, state]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)) / 1024


class _Web:
    """A gunicorn with threads, and clients that keep their connections."""

    def __init__(self, url: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        site = f"tests.bench.web:make('{url}')"
        command = [sys.executable, "-m", "gunicorn", "--threads", "8", "--no-control-socket"]
        command += ["--log-level", "critical", "--bind", f"127.0.0.1:{self._port}", site]
        self._process = subprocess.Popen(command)

    def __enter__(self) -> _Web:
        eventually(lambda: self._get(HTTPConnection("127.0.0.1", self._port), "/publish"), 30)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(10)

    def _get(self, connection: HTTPConnection, path: str) -> bool:
        try:
            connection.request("GET", path)
            return connection.getresponse().read() == b"ok"
        except OSError:
            return False

    def requests(self, path: str) -> Callable[[], float]:
        """Return a measure of the requests a second of 8 clients."""
        share = WEB_REQUESTS // 8

        def client(_: int) -> None:
            connection = HTTPConnection("127.0.0.1", self._port)
            for _ in itertools.repeat(None, share):
                assert self._get(connection, path)
            connection.close()

        def run() -> None:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(client, range(8)))

        return lambda: per_second(share * 8, run)
