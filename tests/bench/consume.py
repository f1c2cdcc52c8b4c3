"""Consuming: a worker, against what the client, a framework and a bare socket can do."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_natspubsub import NatsPubsub
from tests.support.databases import use_wal
from tests.support.waiting import eventually

from .harness import Comparison, Variant, measure
from .peers import NatsPy, RawSocket, per_second
from .peers_dramatiq import dramatiq_worker
from .peers_faststream import faststream_pull

COUNT = 100_000
FETCHED = 6_000
FASTSTREAM = 2_000
WRITTEN = 1_500
#: How often the server is asked how much is left; seconds.
LOOK = 0.05
EIGHT = ("--concurrency", "8")
NO_OP = "the handler does nothing"
SILENT = "few switch the log off; the handler does nothing"
STREAM = "bench-events-stream"
SUBJECT = "bench.shop.order.created"
SITE = Path(__file__).with_name("site.py")


def comparisons(url: str, rounds: int) -> list[Comparison]:
    """Measure workers on a stream that was filled beforehand, each with its own consumer."""
    logging.getLogger("flask_natspubsub").setLevel(logging.ERROR)
    app, publisher = _app(url)
    with app.app_context():
        for start in range(0, COUNT, 1000):
            batch = [("order.created", {"n": start + n, "note": "x" * 150}) for n in range(1000)]
            publisher.publish_many(batch)
    naive = NatsPy(url)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return measure(list(_pairs(url, naive, Path(folder))), rounds)
        finally:
            naive.close()
            publisher.shutdown()


def _pairs(url: str, naive: NatsPy, folder: Path) -> Iterator[Comparison]:
    numbers = itertools.count()

    def durable() -> str:
        return f"peer{next(numbers)}"

    def fetch() -> float:
        seconds = naive.fetch(SUBJECT, STREAM, durable(), FETCHED, 100)
        return FETCHED / seconds

    def raw() -> float:
        name = durable()
        naive.make_consumer(SUBJECT, STREAM, name)
        socket = RawSocket(url)
        try:
            return per_second(COUNT, lambda: socket.pull(STREAM, name, COUNT, 500))
        finally:
            socket.close()

    def framework() -> float:
        return faststream_pull(url, SUBJECT, STREAM, durable(), FASTSTREAM, folder)

    logged = Variant("worker, log into a file", lambda: _command(url, folder, *EIGHT))
    silent = Variant("worker, log off", lambda: _command(url, folder, *EIGHT, log=False))
    fetched = Variant("nats-py fetch(100) + ack", fetch)
    yield Comparison(logged, fetched, 1.8, differs=NO_OP)
    yield Comparison(silent, fetched, 2.3, differs=SILENT)
    yield Comparison(silent, Variant("raw pull(500), acks in one write", raw), 0.30, differs=SILENT)
    peer = Variant("FastStream pull 100, sync handler, its log", framework)
    yield Comparison(logged, peer, 12, differs=NO_OP)
    tasks = Variant("dramatiq on redis, 8 threads", lambda: dramatiq_worker(FASTSTREAM))
    yield Comparison(logged, tasks, 15, differs=NO_OP)
    yield Comparison(
        Variant("--processes 2, log into a file", lambda: _processes(url, folder, 2)),
        Variant("--processes 1, log into a file", lambda: _processes(url, folder, 1)),
        1.4,
        differs=NO_OP,
    )
    yield Comparison(
        Variant("handler that writes, with inbox", lambda: _writing(url, folder, inbox=True)),
        Variant("without inbox, one more INSERT", lambda: _writing(url, folder, inbox=False)),
        0.8,
        differs="SQLite, and a worker in threads of another process",
    )


def _app(url: str, **config: Any) -> tuple[Flask, NatsPubsub]:
    app = Flask("shop")
    app.config.update(NATSPUBSUB_URLS=url, NATSPUBSUB_ENV="bench", NATSPUBSUB_PUBLISH_TIMEOUT=30)
    app.config.update(NATSPUBSUB_CONCURRENCY=8, **config)
    return app, NatsPubsub(app)


class _Stopwatch:
    """From the message that ends the warming up to the last."""

    def __init__(self, warm: int, total: int) -> None:
        self._warm, self._total = warm, total
        self._count = itertools.count(1)
        self._began = 0.0
        self.done = threading.Event()

    def tick(self) -> None:
        number = next(self._count)
        if number == self._warm:
            self._began = time.perf_counter()
        elif number == self._total:
            self.done.set()

    def rate(self) -> float:
        """Return messages a second; to be called when all are acknowledged."""
        return (self._total - self._warm) / (time.perf_counter() - self._began)


def _run(app: Flask, pubsub: NatsPubsub, watch: _Stopwatch) -> float:
    with app.app_context(), pubsub.run_worker():
        if not watch.done.wait(120):
            raise TimeoutError("the worker did not finish")
        rate = watch.rate()
    pubsub.shutdown()
    return rate


def _info(pubsub: NatsPubsub) -> Any:
    state = pubsub.state()
    return state.broker().consumer_info(STREAM, state.subscriptions()[0].durable)


_numbers = itertools.count()


def _writing(url: str, folder: Path, *, inbox: bool) -> float:
    """Write a row for each message; without the inbox one more, so that the rows are as many."""
    name = f"writer{next(_numbers)}"
    app = Flask("shop")
    app.config.update(
        SQLALCHEMY_DATABASE_URI=f"sqlite:///{folder / name}.db",
        NATSPUBSUB_URLS=url,
        NATSPUBSUB_ENV="bench",
        NATSPUBSUB_CONCURRENCY=1,  # SQLite lets one write at a time
        NATSPUBSUB_USE_INBOX=inbox,
    )
    db = SQLAlchemy(app)
    pubsub = NatsPubsub(app, db)
    orders = db.Table("orders", db.Column("id", db.Integer, primary_key=True))
    other = db.Table(
        "other",
        db.Column("event_id", db.String(255), primary_key=True),
        db.Column("subscriber", db.String(100), primary_key=True),
    )
    with app.app_context():
        use_wal(db.engine)
        db.create_all()
    watch = _Stopwatch(100, WRITTEN)

    @pubsub.subscriber("order.created", name=name)
    def handle(message: dict[str, Any], context: Any) -> None:
        if not inbox:
            row = {"event_id": context.event_id, "subscriber": name}
            db.session.execute(other.insert().values(row))
        db.session.execute(orders.insert().values(id=message["n"]))
        watch.tick()

    try:
        return _run(app, pubsub, watch)
    finally:
        with app.app_context():
            db.engine.dispose()


def _command(url: str, folder: Path, *options: str, log: bool = True) -> float:
    """Run the command as people start it, its log into a file, and measure a part of its work."""
    name = f"command{next(_numbers)}"
    app, pubsub = _app(url)
    pubsub.subscriber("order.created", name=name)(lambda message: None)
    command = [sys.executable, "-m", "flask", "--app", str(SITE), "natspubsub", "worker", *options]
    environment = os.environ | {
        "FLASK_NATSPUBSUB_URLS": url,
        "FLASK_NATSPUBSUB_ENV": "bench",
        "BENCH_SUBSCRIBER": name,
        "BENCH_LOG": "on" if log else "off",
    }
    with (folder / f"{name}.log").open("wb") as stderr:
        worker = subprocess.Popen(command, stderr=stderr, env=environment)
        try:
            with app.app_context():
                return _share(lambda: _info(pubsub))
        finally:
            worker.terminate()
            worker.wait(30)
            pubsub.shutdown()


def _processes(url: str, folder: Path, number: int) -> float:
    """Let so many processes of 4 threads share one consumer."""
    return _command(url, folder, "--concurrency", "4", "--processes", str(number))


def _share(info: Callable[[], Any]) -> float:
    """Return the rate between two looks at the consumer: all processes up, and nearly done."""
    seen: list[tuple[float, int]] = []

    def reached(pending: int) -> bool:
        now = info()
        if now is None or now.pending > pending:
            return False
        seen.append((time.perf_counter(), now.pending))
        return True

    eventually(lambda: reached(COUNT // 2), 60, interval=LOOK)
    eventually(lambda: reached(COUNT // 10), 60, interval=LOOK)
    (began, first), (ended, last) = seen
    return (first - last) / (ended - began)
