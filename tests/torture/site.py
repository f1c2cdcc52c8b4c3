"""A site under torture: nats-server, a database, and the shop's processes."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import sqlalchemy as sa

from flask_natspubsub import NatsPubsub
from flask_natspubsub.app.state import AppState
from tests.support.cluster import NatsCluster
from tests.support.databases import sqlite_url
from tests.support.processes import Child, Children
from tests.support.proxy import Proxy
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

from . import failpoints
from .shop import TICKS, TOPIC, create_app, db, place_order

FLASK = (sys.executable, "-m", "flask", "--app", "tests.torture.shop", "natspubsub")


class Site:
    """The servers and processes of one scenario; a context manager that leaves nothing behind.

    :param database: its address; default a SQLite file.
    :param lease: duration of leases, seconds; default as in production.
    :param slowness: longest time that a handler takes, seconds; each takes another.
    :param nats: what is to be started; default one server.
    :param proxied: whether there is a ``proxy`` on the way to it, which can be cut.
    :param settings: ``NATSPUBSUB_`` keys in lower case, for all processes.
    """

    def __init__(
        self,
        database: str | None = None,
        *,
        lease: float | None = None,
        slowness: float = 0.0,
        nats: NatsServer | NatsCluster | None = None,
        proxied: bool = False,
        **settings: Any,
    ) -> None:
        self.nats = nats or NatsServer()
        self.proxy: Proxy | None = None
        self._proxied = proxied
        self._stack = ExitStack()
        self._database = database
        self._lease = lease
        self._slowness = slowness
        self.settings = {
            "env": "torture",
            "app_name": "shop",
            "use_inbox": True,
            "ack_wait": 2,
            "backoff": [0.2],
            "max_deliver": 1_000_000,
            "outbox_poll_interval": 0.2,
            **settings,
        }

    def __enter__(self) -> Site:
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            for role in ("relay", "worker", "web"):
                print(
                    f"--- the last of the {role}'s log\n{self.children.log(role)}", file=sys.stderr
                )
        self._stack.close()

    def _open(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="torture-")))
        self.folder = folder
        url = self._database or f"{sqlite_url(folder)}?timeout=15"
        self._stack.enter_context(self.nats)
        config = {f"NATSPUBSUB_{key.upper()}": value for key, value in self.settings.items()}
        config |= {"NATSPUBSUB_URLS": self._urls(), "SQLALCHEMY_DATABASE_URI": url}
        environment = {f"FLASK_{key}": json.dumps(value) for key, value in config.items()}
        environment[failpoints.RESENT] = str(folder / "resent")
        environment[TICKS] = str(folder / "ticks")
        environment["TORTURE_SLOWNESS"] = str(self._slowness)
        if self._lease is not None:
            environment[failpoints.LEASE] = str(self._lease)
        self.children = self._stack.enter_context(Children(folder, environment))
        self.app = create_app(config)
        self.pubsub: NatsPubsub = self.app.extensions["torture"]
        self._stack.callback(self._close_app)
        with self.app.app_context():
            db.create_all()
            eventually(lambda: self.pubsub.is_connected, 30)

    def _urls(self) -> list[str]:
        if not self._proxied:
            return self.nats.urls
        assert isinstance(self.nats, NatsServer)
        self.proxy = self._stack.enter_context(Proxy(self.nats.port))
        return [self.proxy.url]

    def cut(self) -> None:
        """Cut all connections to the server."""
        assert self.proxy is not None, "there is no proxy on the way"
        self.proxy.cut()

    def _close_app(self) -> None:
        self.pubsub.shutdown(self.app)
        with self.app.app_context():
            db.engine.dispose()

    @property
    def state(self) -> AppState:
        """The extension's state of the application in this process."""
        return self.pubsub.state(self.app)

    # --- the processes

    def start_relay(self, fail: str = "") -> Child:
        """Start ``flask natspubsub relay``, with a fail-point if it is to die."""
        return self.children.start("relay", *FLASK, "relay", **{failpoints.FAIL: fail})

    def start_worker(self, fail: str = "", *, concurrency: int = 4) -> Child:
        """Start ``flask natspubsub worker --no-relay``, with a fail-point if it is to die."""
        command = (*FLASK, "worker", "--no-relay", "--concurrency", str(concurrency))
        return self.children.start("worker", *command, **{failpoints.FAIL: fail})

    def start_web(self, port: int) -> Child:
        """Start gunicorn with four threads."""
        options = ("--bind", f"127.0.0.1:{port}", "--threads", "4", "--no-control-socket")
        command = (sys.executable, "-m", "gunicorn", *options, "tests.torture.shop:create_app()")
        return self.children.start("web", *command)

    # --- the database

    def publish(self, count: int, keys: Iterable[str | None] = (None,), each: int = 10) -> None:
        """Place ``count`` orders, ``each`` in one transaction, their ordering keys in turn."""
        turn = list(keys)
        for start in range(0, count, each):
            with self.app.app_context():
                for number in range(start, min(start + each, count)):
                    place_order(self.pubsub, turn[number % len(turn)])
                db.session.commit()

    def publish_ticks(self, count: int) -> None:
        """Publish messages without effect directly, bypassing the outbox."""
        with self.app.app_context():
            self.pubsub.publish_many([(TOPIC, {"tick": True})] * count)

    @property
    def ticks(self) -> int:
        """Messages without an effect that the worker has handled; known when it has ended."""
        return int((self.folder / "ticks").read_text())

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        with self.app.app_context(), db.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(query))]

    def number(self, query: str) -> int:
        """The one number that a query gives."""
        return int(self.rows(query)[0][0])

    @property
    def pending(self) -> int:
        """Rows that the relay has still to send."""
        return self.number("SELECT count(*) FROM natspubsub_outbox WHERE status <> 'sent'")

    @property
    def handled(self) -> int:
        """Messages that have had their effect."""
        return self.number("SELECT count(DISTINCT event_id) FROM effect")

    @property
    def last_effect(self) -> int:
        """The id of the newest effect; cheaper than a count."""
        return self.number("SELECT coalesce(max(id), 0) FROM effect")

    @property
    def unhandled(self) -> int:
        """Committed messages that have had no effect yet."""
        return self.number("SELECT count(*) FROM natspubsub_outbox") - self.handled

    @property
    def resent(self) -> list[str]:
        """The event ids that a relay sent although the stream had them already."""
        path = self.folder / "resent"
        return path.read_text().split() if path.exists() else []

    # --- the stream

    @property
    def stored(self) -> int:
        """Messages in the stream."""
        info = self.state.broker().stream_info(self.state.settings.stream)
        return info.messages if info else 0

    def relay_all(self) -> None:
        """Send what is pending from this process."""
        with self.app.app_context():
            eventually(lambda: self.pubsub.make_relay().run_once() or not self.pending, 60)

    def is_consumed(self) -> bool:
        """Whether the worker has nothing left to do: all is delivered and settled."""
        (subscription,) = self.state.subscriptions()
        info = self.state.broker().consumer_info(self.state.settings.stream, subscription.durable)
        return info is not None and not info.pending and not info.ack_pending

    def await_effects(self, timeout: float = 60.0) -> None:
        """Wait until all rows are relayed and all messages consumed."""
        eventually(lambda: self.pending == 0, timeout, "rows are still pending", 0.1)
        eventually(self.is_consumed, timeout, "messages are still to be handled", 0.1)

    def finish(self, timeout: float = 60.0) -> None:
        """Wait until the processes have nothing left to do, and stop them."""
        self.await_effects(timeout)
        codes = self.children.stop_all()
        assert not any(codes), f"exit codes {codes}"


def kill_in_turn(
    site: Site,
    kills: int,
    start: Callable[[], Child],
    feed: Callable[[], None],
    progress: Callable[[int], None],
    lanes: int = 2,
) -> list[Child]:
    """Keep ``lanes`` processes alive that kill themselves, until ``kills`` of them have."""
    alive = [start() for _ in range(lanes)]
    ended: list[Child] = []
    while len(ended) < kills:
        feed()
        eventually(lambda: any(child.has_ended for child in alive), 60, "none died")
        dead = next(child for child in alive if child.has_ended)
        site.children.check_killed(dead)
        alive.remove(dead)
        ended.append(dead)
        progress(len(ended))
        if len(ended) < kills:
            alive.append(start())
    for child in alive:
        child.kill()
    return ended
