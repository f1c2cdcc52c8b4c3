"""The outbox: what a request costs while NATS is up and while it is down, and the relay."""

from __future__ import annotations

import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Session

from flask_natspubsub import NatsPubsub
from tests.support.databases import PostgresServer, use_wal

from .harness import Comparison, Variant, measure
from .peers import NatsPy, per_second
from .peers_outbox import faststream_outbox

REQUESTS = 300
ROWS = 10_000
NAIVE_ROWS = 300
PEER_ROWS = 1_500
CLIENT = "Flask's test client, no web server"
BACKLOG = "only after an outage do so many rows wait"
PEER_SUBJECT = "bench.postgresql.order.created"


def comparisons(url: str, rounds: int) -> list[Comparison]:
    """Measure on SQLite in WAL mode and on PostgreSQL, which syncs each commit."""
    with (
        tempfile.TemporaryDirectory() as folder,
        PostgresServer(fsync=True) as postgres,
        socket.socket() as closed,
    ):
        closed.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers here
        down_url = f"nats://127.0.0.1:{closed.getsockname()[1]}"
        sites = (
            _Site("sqlite", f"sqlite:///{Path(folder) / 'up'}.db", url),
            _Site("down", f"sqlite:///{Path(folder) / 'down'}.db", down_url),
            _Site("postgresql", postgres.url(), url),
        )
        naive = NatsPy(url)
        try:
            return measure(list(_pairs(url, naive, *sites)), rounds)
        finally:
            naive.close()
            for site in sites:
                site.close()


def _pairs(
    url: str, naive: NatsPy, sqlite: _Site, down: _Site, postgres: _Site
) -> Iterator[Comparison]:
    yield Comparison(
        Variant("request with outbox, NATS down", down.requests("/order")),
        Variant("the same, NATS up", sqlite.requests("/order")),
        0.8,
        differs=CLIENT,
    )
    stream = postgres.pubsub.state(postgres.app).settings.stream
    peer = Variant(
        "faststream-outbox, 10 workers",
        lambda: faststream_outbox(postgres.database, url, PEER_SUBJECT, stream, PEER_ROWS),
    )
    for site in (sqlite, postgres):
        yield Comparison(
            Variant(f"request with outbox, {site.name}, ms", site.milliseconds("/order")),
            Variant("the same without a publish, ms", site.milliseconds("/plain")),
            differs=CLIENT,
        )
        if site is postgres:
            allowed = Variant("allowed, ms", lambda: 0.6)
            added = Variant("the outbox adds to a request, postgresql, ms", site.added_by_outbox)
            yield Comparison(added, allowed, 1, at_most=True, differs=CLIENT)
        relay = Variant(f"relay, {site.name}, batches of 500", site.relay)
        by_row = Variant("row by row, a commit each", partial(site.relay_row_by_row, naive))
        must = 30 if site is sqlite else None
        yield Comparison(relay, by_row, must, differs=BACKLOG)
        if site is postgres:
            limit = Variant("claim and mark by 500, no publish", site.claim_and_mark)
            yield Comparison(relay, limit, 0.45, differs=BACKLOG)
            yield Comparison(relay, peer, 18, differs=BACKLOG)


class _Site:
    """A small site with a database of its own."""

    def __init__(self, name: str, database: str, url: str) -> None:
        self.name = name
        self.database = database
        self.app = Flask(name)
        self.app.config.update(
            SQLALCHEMY_DATABASE_URI=database,
            NATSPUBSUB_URLS=url,
            NATSPUBSUB_ENV="bench",
            NATSPUBSUB_USE_OUTBOX=True,
        )
        self.db = SQLAlchemy(self.app)
        self.pubsub = NatsPubsub(self.app, self.db)
        self.order, self.row = self._models()
        self.app.add_url_rule("/order", "order", lambda: self._request(publish=True))
        self.app.add_url_rule("/plain", "plain", lambda: self._request(publish=False))
        with self.app.app_context():
            if database.startswith("sqlite"):
                use_wal(self.db.engine)
            self.db.create_all()

    def _models(self) -> tuple[Any, Any]:
        db = self.db

        class Order(db.Model):  # type: ignore[name-defined,misc]
            id = db.Column(db.Integer, primary_key=True)
            note = db.Column(db.String(200))

        class Row(db.Model):  # type: ignore[name-defined,misc]
            __table__ = db.metadata.tables["natspubsub_outbox"]

        return Order, Row

    def _request(self, *, publish: bool) -> str:
        self.db.session.add(self.order(note="x" * 150))
        if publish:
            self.pubsub.publish("order.created", {"order_id": 1, "note": "x" * 150})
        self.db.session.commit()
        return "ok"

    def requests(self, path: str) -> Callable[[], float]:
        client: FlaskClient = self.app.test_client()

        def run() -> None:
            for _ in range(REQUESTS):
                assert client.get(path).status_code == 200

        return lambda: per_second(REQUESTS, run)

    def milliseconds(self, path: str) -> Callable[[], float]:
        """Return a measure of the time of one request."""
        rate = self.requests(path)
        return lambda: 1000 / rate()

    def added_by_outbox(self) -> float:
        """Return the milliseconds between requests with and without a publish, in turn."""
        client, times = self.app.test_client(), dict[str, list[float]](plain=[], order=[])
        for _ in range(REQUESTS):
            for path, taken in times.items():
                began = time.perf_counter()
                assert client.get(f"/{path}").status_code == 200
                taken.append(time.perf_counter() - began)
        plain, order = (statistics.median(taken) for taken in times.values())
        return (order - plain) * 1000

    def claim_and_mark(self) -> float:
        """Do what the database has to do for the relay, and nothing else."""
        self._fill(ROWS)
        with self.app.app_context():
            return per_second(ROWS, self._claim_all)

    def _claim_all(self) -> None:
        session, text = self.db.session, self.db.text
        claim = text(
            "SELECT id, event_id, subject, headers, payload FROM natspubsub_outbox "
            "WHERE status = 'pending' ORDER BY id LIMIT 500"
        )
        mark = text("UPDATE natspubsub_outbox SET status = 'sent' WHERE id = ANY(:ids)")
        while rows := session.execute(claim).all():
            session.execute(mark, {"ids": [row.id for row in rows]})
            session.commit()

    def _fill(self, count: int) -> None:
        with self.app.app_context():
            self.pubsub.make_relay().run_once()
            self.pubsub.publish_many([("order.created", {"n": n}) for n in range(count)])
            self.db.session.commit()

    def relay(self) -> float:
        self._fill(ROWS)
        relay = self.pubsub.make_relay()
        return per_second(ROWS, relay.run_once)

    def relay_row_by_row(self, nats: NatsPy) -> float:
        """Do as one would by hand: read a row, publish it, mark it, commit."""
        self._fill(NAIVE_ROWS)
        with self.app.app_context():
            return per_second(NAIVE_ROWS, lambda: self._row_by_row(nats))

    def _row_by_row(self, nats: NatsPy) -> None:
        oldest = (
            sa.select(self.row).where(self.row.status == "pending").order_by(self.row.id).limit(1)
        )
        with Session(self.db.engine, expire_on_commit=False) as session:
            for _ in range(NAIVE_ROWS):
                row = session.scalars(oldest).one()
                nats.publish_row(row.subject, row.payload, row.event_id)
                row.status = "sent"
                session.commit()

    def close(self) -> None:
        self.pubsub.shutdown()
        with self.app.app_context():
            self.db.engine.dispose()
