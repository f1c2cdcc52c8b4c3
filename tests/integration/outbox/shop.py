"""An app with an outbox, and queries of its rows and its stream."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_natspubsub import NatsPubsub, PublishError
from flask_natspubsub.brokers.base import Broker, Ticket
from flask_natspubsub.brokers.topology import wakeup_subject
from flask_natspubsub.messages.message import Message, StoredMessage
from flask_natspubsub.outbox.relay import Relay
from tests.support.databases import use_wal
from tests.support.waiting import eventually

TIMEOUT = 20.0


def engine_options(url: str) -> dict[str, Any]:
    """Room for all the writers of a test."""
    return {"pool_size": 60} if not url.startswith("sqlite") else {}


def begin_transactions(engine: sa.Engine) -> None:
    """Make savepoints of SQLite work: its driver begins no transaction for them.

    See "Serializable isolation / Savepoints / Transactional DDL" in SQLAlchemy's docs.
    """
    if engine.dialect.name != "sqlite":
        return

    @sa.event.listens_for(engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def began(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    engine.dispose()


def begin_before_savepoints(engine: sa.Engine) -> None:
    """The other way, as the docs show it: a transaction is begun where a savepoint needs one."""

    @sa.event.listens_for(engine, "savepoint")
    def savepoint(connection: sa.Connection, name: str) -> None:
        driver: Any = connection.connection.driver_connection
        if not driver.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")


class OutboxShop:
    """A shop with orders and products; leave it to close everything.

    :param settings: of the extension; the broker is in memory unless ``urls`` says otherwise.
    """

    def __init__(self, url: str, *, tables: bool = True, **settings: Any) -> None:
        self.app = Flask("shop")
        self.app.config["SQLALCHEMY_DATABASE_URI"] = url
        self.app.config["SQLALCHEMY_ENGINE_OPTIONS"] = engine_options(url)
        settings = {"urls": "memory://", "app_name": "shop", "use_outbox": True, **settings}
        for key, value in settings.items():
            self.app.config[f"NATSPUBSUB_{key.upper()}"] = value
        self.db = SQLAlchemy(self.app)
        self.Order, self.Product = define_models(self.db)
        self.pubsub = NatsPubsub(self.app, self.db)
        self.state = self.pubsub.state(self.app)
        self._relays: list[tuple[Relay, threading.Thread]] = []
        with self.app.app_context():
            use_wal(self.db.engine)
            if tables:
                self.db.create_all()

    def __enter__(self) -> OutboxShop:
        return self

    def __exit__(self, *error: object) -> None:
        for relay, _ in self._relays:
            relay.stop()
        for _, thread in self._relays:
            thread.join(TIMEOUT)
        self.pubsub.shutdown(self.app)
        with self.app.app_context():
            for engine in self.db.engines.values():
                engine.dispose()

    # --- what the test does

    @property
    def session(self) -> Any:
        return self.db.session

    @property
    def broker(self) -> Broker:
        return self.state.broker()

    def publish(self, *numbers: int, topic: str = "order.created", **options: Any) -> None:
        """Publish ``{"n": number}`` for each."""
        for number in numbers:
            self.pubsub.publish(topic, {"n": number}, **options)

    def commit(self, *numbers: int, **options: Any) -> None:
        """Publish each, and commit, in an application context of their own."""
        with self.app.app_context():
            self.publish(*numbers, **options)
            self.session.commit()

    def relay(self) -> Relay:
        """A relay that is not started."""
        return self.pubsub.state(self.app).make_relay()

    def start_relay(self, relay: Relay | None = None) -> Relay:
        """Start a relay, a new one unless given, in a thread; it is stopped at the end."""
        relay = relay or self.relay()
        thread = threading.Thread(target=relay.run, name="relay")
        self._relays.append((relay, thread))
        thread.start()
        return relay

    def stop_relay(self, relay: Relay) -> None:
        relay.stop()
        next(thread for one, thread in self._relays if one is relay).join(TIMEOUT)

    def use_flaky_broker(self) -> FlakyBroker:
        """Have publishes go through a broker that fails as the test says."""
        flaky = FlakyBroker(self.broker)
        self.state.use_broker(flaky)  # type: ignore[arg-type]  # it has all that a broker has
        return flaky

    def advance(self, seconds: float) -> None:
        """Move the clock by which rows are due."""
        assert self.state.persistence is not None
        self.state.persistence.database.skew += seconds

    # --- what the test looks at

    @property
    def engine(self) -> sa.Engine:
        persistence = self.state.persistence
        assert persistence is not None
        return persistence.database.engine

    @property
    def store(self) -> Any:
        persistence = self.state.persistence
        assert persistence is not None
        return persistence.store

    def execute(self, statement: Any, *values: Any) -> Any:
        """Run a statement in a transaction of its own; its rows, if any."""
        if isinstance(statement, str):
            statement = sa.text(statement)
        with self.engine.begin() as connection:
            result = connection.execute(statement, *values)
            return result.all() if result.returns_rows else result.rowcount

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The committed rows of the outbox, in order."""
        table = self.store.table
        return [dict(row._mapping) for row in self.execute(sa.select(table).order_by(table.c.id))]

    @property
    def orders(self) -> list[str]:
        """The names of the committed orders, in order."""
        order = self.Order
        return list(map(str, self.execute_scalars(sa.select(order.name).order_by(order.id))))

    def execute_scalars(self, statement: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.scalars(statement))

    @property
    def numbers(self) -> list[int]:
        """``n`` of each row, in order."""
        return [numbers_of(row["payload"]) for row in self.rows]

    @property
    def stored(self) -> list[StoredMessage]:
        """The messages in the stream, in order."""
        return list(self.broker.messages(self.state.settings.stream))

    @property
    def sent(self) -> list[int]:
        """``n`` of each message in the stream, in order."""
        return [numbers_of(message.data) for message in self.stored]

    def count_stored(self) -> int:
        info = self.broker.stream_info(self.state.settings.stream)
        return info.messages if info else 0

    def wait_for_sent(self, count: int, timeout: float = TIMEOUT) -> None:
        eventually(
            lambda: self.count_stored() >= count,
            timeout,
            f"{count} messages were expected within {timeout} s",
        )

    def wait_until_marked(self, timeout: float = TIMEOUT) -> None:
        """Wait until no row is pending."""
        eventually(lambda: not self.store.counts()["pending"], timeout, "rows are still pending")

    @contextmanager
    def counting(self) -> Iterator[list[str]]:
        """Collect the statements of the block, without BEGIN and COMMIT."""
        statements: list[str] = []

        def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            statements.append(statement)

        sa.event.listen(self.engine, "before_cursor_execute", note)
        try:
            yield statements
        finally:
            sa.event.remove(self.engine, "before_cursor_execute", note)

    @contextmanager
    def explaining(self) -> Iterator[list[str]]:
        """Collect how the database carries out the statements on the outbox, at the end."""
        found: list[tuple[str, Any]] = []
        plans: list[str] = []

        def note(_: Any, __: Any, statement: str, parameters: Any, ___: Any, ____: Any) -> None:
            if "natspubsub_outbox" in statement:
                found.append((statement, parameters))

        sa.event.listen(self.engine, "before_cursor_execute", note)
        yield plans
        sa.event.remove(self.engine, "before_cursor_execute", note)
        explain = "EXPLAIN QUERY PLAN " if self.engine.name == "sqlite" else "EXPLAIN "
        with self.engine.connect() as connection:
            for statement, parameters in found:
                rows = connection.exec_driver_sql(explain + statement, parameters).mappings()
                # MySQL also names the indexes that it could have used.
                plans.append(str([row.get("key", dict(row)) for row in rows]))

    @contextmanager
    def wakeups(self) -> Iterator[list[bytes]]:
        """Collect the wake-ups of relays; of a broker in memory only."""
        found: list[bytes] = []

        def note(message: Message) -> None:
            found.append(message.data)

        listening = self.broker.listen(wakeup_subject(self.state.settings), note)
        try:
            yield found
        finally:
            with suppress(Exception):
                listening.stop()


class FlakyBroker:
    """A broker in front of another one that fails messages, by their ``n``."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        #: The errors that the next attempts to send a number end in.
        self.failures: dict[int, list[PublishError]] = {}
        #: What each call was to send.
        self.calls: list[list[int]] = []
        #: Called before each call is carried out.
        self.before: Callable[[], object] = lambda: None
        self.loses_wakeups = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    def send(self, subject: str, payload: bytes) -> None:
        if not self.loses_wakeups:
            self._broker.send(subject, payload)

    def submit(self, messages: Sequence[Message], timeout: float) -> Ticket:
        self.calls.append([numbers_of(message.data) for message in messages])
        self.before()
        ticket = Ticket(len(messages))
        for index, message in enumerate(messages):
            errors = self.failures.get(self.calls[-1][index])
            if errors:
                ticket.set_result(index, errors.pop(0))
                continue
            inner = self._broker.submit([message], timeout)
            assert inner.wait(timeout + 1)
            result = inner.results[0]
            assert result is not None
            ticket.set_result(index, result)
        return ticket


def define_models(db: SQLAlchemy) -> tuple[Any, Any]:
    """Define the shop's models in the metadata of ``db``."""

    class Order(db.Model):  # type: ignore[name-defined,misc]
        __tablename__ = "orders"
        id = sa.Column(sa.Integer, primary_key=True)
        name = sa.Column(sa.String(80), nullable=False, unique=True)

    class Product(db.Model):  # type: ignore[name-defined,misc]
        __tablename__ = "products"
        id = sa.Column(sa.Integer, primary_key=True)
        name = sa.Column(sa.String(80), nullable=False)
        price = sa.Column(sa.Numeric(10, 2))
        stock = sa.Column(sa.Integer, default=0)
        api_token = sa.Column(sa.String(80))

    return Order, Product


def numbers_of(payload: bytes) -> int:
    """``n`` of an encoded envelope."""
    number: int = message_of(payload)["n"]
    return number


def message_of(payload: bytes) -> dict[str, Any]:
    """The message in an encoded envelope."""
    message: dict[str, Any] = json.loads(payload)["message"]
    return message


def is_subsequence(part: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether ``part`` can be had from ``whole`` by leaving some out."""
    rest = iter(whole)
    return all(number in rest for number in part)
