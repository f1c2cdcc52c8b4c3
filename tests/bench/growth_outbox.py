"""What a batch of the relay costs, with more and more rows in the table."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_natspubsub import NatsPubsub
from flask_natspubsub.brokers.base import StoredAck
from flask_natspubsub.database.leases import Lease
from flask_natspubsub.outbox.store import OutboxStore
from tests.support.databases import PostgresServer, sqlite_url, use_wal

from .curves import Curve

BATCH = 100
REPEATS = 7
TOMORROW = 86_400.0
_FILL = """
    INSERT INTO natspubsub_outbox (event_id, subject, headers, payload, partition, status,
        attempts, created_at, sent_at, available_at)
    WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last})
    SELECT 'e' || i, 'bench.shop.order.created', '{{}}', {payload}, 0, '{status}',
        0, {now}, {sent_at}, {available_at} FROM n
"""


class Table:
    """An outbox that is filled by SQL, and the relay's side of it."""

    def __init__(self, url: str) -> None:
        self._app = Flask("shop")
        self._app.config.update(
            SQLALCHEMY_DATABASE_URI=url,
            NATSPUBSUB_URLS="memory://",
            NATSPUBSUB_USE_OUTBOX=True,
        )
        self._db = SQLAlchemy(self._app)
        self._pubsub = NatsPubsub(self._app, self._db)
        persistence = self._pubsub.state(self._app).persistence
        assert persistence is not None
        self.store: OutboxStore = persistence.store
        self._rows = 0
        with self._app.app_context():
            self._engine = self._db.engine
            if self._is_sqlite:
                use_wal(self._engine)
            self._db.drop_all()
            self._db.create_all()
        lease = self.store.leases.acquire("outbox/0", "bench")
        assert lease is not None
        self._lease: Lease = lease

    @property
    def _is_sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    def _execute(self, statement: str) -> None:
        with self._engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql(statement.replace("%", "%%"))

    def add(
        self,
        count: int,
        status: str = "pending",
        available_in: float | None = None,
    ) -> None:
        """Add rows; ``available_in`` seconds they are due."""
        now = str(int(time.time()))
        values = {
            "payload": "zeroblob(300)" if self._is_sqlite else "decode(repeat('00', 300), 'hex')",
            "sent_at": now if status == "sent" else "NULL",
            "available_at": "NULL" if available_in is None else f"{now} + {available_in}",
        }
        first, self._rows = self._rows + 1, self._rows + count
        self._execute(_FILL.format(first=first, last=self._rows, status=status, now=now, **values))
        self._execute("ANALYZE")

    def relay(self) -> None:
        """Read a batch and mark it as sent, as a relay does."""
        rows = self.store.due(0, BATCH)
        assert len(rows) == BATCH, len(rows)
        acks = {row.id: StoredAck("bench-events-stream", row.id, False) for row in rows}
        self._lease = self.store.leases.acquire("outbox/0", "bench") or self._lease
        assert self.store.mark(self._lease, acks, {})

    def close(self) -> None:
        self._pubsub.shutdown(self._app)
        self._engine.dispose()


def milliseconds(action: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the shortest time that ``action`` takes: what else the machine does adds to it."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        taken.append((time.perf_counter() - started) * 1000)
    return min(taken)


Fill = Callable[[Table, int], None]
Looks = dict[str, Callable[[Table], object]]


def _sent(table: Table, count: int) -> None:
    table.add(count, status="sent")


def _tomorrow(table: Table, count: int) -> None:
    table.add(count, available_in=TOMORROW)


FILLS: dict[str, Fill] = {
    "pending": lambda table, count: table.add(count),
    "sent and kept": _sent,
    "due tomorrow": _tomorrow,
}


@contextmanager
def databases() -> Iterator[dict[str, str]]:
    """Return the addresses of databases that are used for nothing else."""
    with tempfile.TemporaryDirectory() as folder, PostgresServer() as server:
        yield {"SQLite": sqlite_url(Path(folder)), "PostgreSQL": server.url("growth")}


def relay_curves(sizes: Sequence[int]) -> list[Curve]:
    """Measure a batch for each database, each kind of rows, and each number of them."""
    curves = []
    with databases() as urls:
        for database, url in urls.items():
            panel = f"Relay on {database}: read and mark {BATCH} rows"
            for name, fill in FILLS.items():
                curve = Curve(panel, name, "other rows in the table", "ms")
                for size in sizes:
                    curve.add(size, _measure(url, fill, size))
                curves.append(curve)
    return curves


def _measure(url: str, fill: Fill, size: int) -> float:
    table = Table(url)
    try:
        fill(table, size)
        table.add(BATCH * (REPEATS + 1))
        table.relay()
        return milliseconds(table.relay)
    finally:
        table.close()


def look_curves(sizes: Sequence[int]) -> list[Curve]:
    """Measure what health, cleaning and the commands ask, with more and more rows kept."""
    looks: Looks = {
        "age of the oldest": lambda table: table.store.oldest_pending_age(),
        "nothing to clean": lambda table: table.store.purge("sent", TOMORROW),
        "first page of pending": lambda table: table.store.list("pending", 50),
        "first page of parked": lambda table: table.store.list("parked", 50),
        "retry all parked": lambda table: table.store.retry(),
        "purge parked": lambda table: table.store.purge("parked", TOMORROW),
    }
    curves = []
    with databases() as urls:
        for database, url in urls.items():
            panel = f"Health and commands on {database}"
            found = {n: Curve(panel, n, "rows sent and kept", "ms") for n in looks}
            for size in sizes:
                _look(url, size, looks, found)
            curves += found.values()
    return curves


def _look(url: str, size: int, looks: Looks, found: dict[str, Curve]) -> None:
    table = Table(url)
    try:
        table.add(size, status="sent")
        table.add(BATCH)
        for name, look in looks.items():
            look(table)
            found[name].add(size, milliseconds(lambda look=look: look(table)))  # type: ignore[misc]
    finally:
        table.close()
