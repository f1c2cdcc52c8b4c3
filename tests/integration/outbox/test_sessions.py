"""Sessions as people use them: hooks, forgotten commits, tenants, replicas, two-phase commits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, abort
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.session import Session

from flask_natspubsub import NatsPubsub, PublishError

from .conftest import MakeShop
from .shop import OutboxShop, define_models

# --- where the row cannot be committed any more


@contextmanager
def hook(shop: OutboxShop, name: str, action: Callable[[], object]) -> Iterator[list[Exception]]:
    """Do something, once, in a hook of the session; collect what it raises."""
    errors: list[Exception] = []
    done: list[bool] = []

    def listener(*arguments: Any) -> None:
        inner = name == "after_transaction_end" and arguments[1].parent is not None
        if not done and not inner:
            done.append(True)
            try:
                action()
            except Exception as error:
                errors.append(error)

    sa.event.listen(shop.db.session, name, listener)
    try:
        yield errors
    finally:
        sa.event.remove(shop.db.session, name, listener)


def end(shop: OutboxShop, how: str) -> None:
    """End the session's transaction, which has a row of the shop's own."""
    shop.session.add(shop.Order(name="a"))
    shop.session.flush()
    getattr(shop.session, how)()


LATE = [
    ("after_commit", "commit"),
    ("after_transaction_end", "commit"),
    ("after_rollback", "rollback"),
    ("after_soft_rollback", "rollback"),
    ("after_transaction_end", "rollback"),
    ("after_transaction_end", "close"),
    ("after_transaction_end", "remove"),
]


@pytest.mark.parametrize(("name", "how"), LATE)
@pytest.mark.parametrize("event_id", [None, "one"])
def test_publish_that_nothing_could_commit_is_refused(
    shop: OutboxShop, name: str, how: str, event_id: str | None
) -> None:
    shop.commit(0)
    with shop.app.app_context(), hook(shop, name, lambda: shop.publish(1, event_id=event_id)) as e:
        end(shop, how)
        shop.publish(2)
        shop.session.commit()
    assert isinstance(e[0], PublishError)
    assert "before the commit" in str(e[0])
    assert e[0].outcome == "not_sent"
    assert shop.numbers == [0, 2]


@pytest.mark.parametrize(("name", "how"), LATE)
def test_direct_publish_is_taken_there(
    shop: OutboxShop, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with shop.app.app_context(), hook(shop, name, lambda: shop.publish(1, outbox=False)) as errors:
        end(shop, how)
    assert not errors
    assert shop.sent == [1]
    assert not caplog.records  # nothing is pending: the transaction is over


@pytest.mark.parametrize(
    "name", ["before_commit", "before_flush", "after_flush", "after_flush_postexec"]
)
@pytest.mark.parametrize("event_id", [None, "one"])
def test_publish_in_time_is_committed(shop: OutboxShop, name: str, event_id: str | None) -> None:
    with shop.app.app_context(), hook(shop, name, lambda: shop.publish(1, event_id=event_id)) as e:
        end(shop, "commit")
    assert not e
    assert (shop.orders, shop.numbers) == (["a"], [1])


def test_publish_in_before_commit_of_a_second_commit(shop: OutboxShop) -> None:
    with shop.app.app_context():
        end(shop, "commit")
        with hook(shop, "before_commit", lambda: shop.publish(1)) as errors:
            shop.session.commit()
    assert (errors, shop.numbers) == ([], [1])


def test_publish_in_the_hook_of_another_session(shop: OutboxShop) -> None:
    with shop.app.app_context():
        other = sa.orm.Session(shop.db.engine)
        sa.event.listen(other, "after_commit", lambda _: shop.publish(1))
        other.add(shop.Order(name="a"))
        other.commit()
        shop.session.commit()
    assert shop.numbers == [1]


def test_publish_after_a_flush_that_failed(shop: OutboxShop) -> None:
    shop.commit(0)
    with shop.app.app_context():
        savepoint = shop.session.begin_nested()
        shop.session.add(shop.Order(name=None))
        with pytest.raises(sa.exc.DBAPIError):
            shop.session.flush()
        with pytest.raises(sa.exc.PendingRollbackError):
            shop.publish(1)
        savepoint.rollback()
        shop.publish(2)
        shop.session.commit()
    assert shop.numbers == [0, 2]


@pytest.mark.parametrize("url", ["mysql"], indirect=True)  # others are not set up for it
def test_two_phase_session(shop: OutboxShop) -> None:
    with shop.app.app_context():
        shop.session.remove()
        shop.session.configure(twophase=True)
        shop.publish(1)
        shop.session.commit()
        shop.publish(2)
        shop.session.rollback()
        shop.publish(3)
        shop.session().prepare()
        with pytest.raises(sa.exc.InvalidRequestError, match="prepared"):
            shop.publish(4)
        shop.session.commit()
    assert shop.numbers == [1, 3]


# --- a commit that was forgotten


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


@pytest.mark.parametrize("flushed", [False, True])
def test_forgotten_commit_is_warned_of_once(
    shop: OutboxShop, flushed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    @shop.app.post("/ping")
    def ping() -> dict[str, str]:
        shop.publish(1)
        if flushed:
            shop.session.flush()
        return {}

    for _ in range(3):
        assert shop.app.test_client().post("/ping").status_code == 200
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"{OutboxShop.publish.__code__.co_filename}:")
    assert "without a commit" in warning
    assert shop.rows == []


def test_forgotten_commit_in_a_script_and_in_a_savepoint(
    sqlite_shop: OutboxShop, caplog: pytest.LogCaptureFixture
) -> None:
    shop = sqlite_shop
    with shop.app.app_context(), shop.session.begin_nested():
        shop.pubsub.publish("a.b", {"n": 1})
    with shop.app.app_context():
        shop.session.begin_nested()
        shop.pubsub.publish("a.b", {"n": 1})
    assert len(warnings_of(caplog)) == 2
    assert all(warning.startswith(__file__) for warning in warnings_of(caplog))


@pytest.mark.parametrize("commits", [False, True])
def test_publish_when_the_session_of_the_context_was_removed_already(
    make_shop: MakeShop, sqlite: str, commits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Teardown functions run in reverse order: one from before db.init_app comes last."""
    shop = make_shop(sqlite)
    ran: list[bool] = []

    def teardown(_error: BaseException | None) -> None:
        if not ran:
            ran.append(True)
            shop.publish(1)
            if commits:
                shop.session.commit()

    shop.app.teardown_appcontext_funcs.insert(0, teardown)
    with shop.app.app_context():
        pass
    assert shop.numbers == ([1] if commits else [])
    assert len(warnings_of(caplog)) == (0 if commits else 1)


def test_session_whose_connection_is_committed(
    sqlite_shop: OutboxShop, caplog: pytest.LogCaptureFixture
) -> None:
    shop = sqlite_shop
    with shop.app.app_context(), shop.db.engine.begin() as connection:
        shop.db.session = sa.orm.scoped_session(sa.orm.sessionmaker(connection))
        shop.publish(1)
        shop.session.flush()
        shop.session.remove()
    assert shop.numbers == [1]
    assert not warnings_of(caplog)


def rolled_back(shop: OutboxShop) -> None:
    shop.publish(1)
    shop.session.rollback()


def savepoint_rolled_back(shop: OutboxShop) -> None:
    savepoint = shop.session.begin_nested()
    shop.publish(1)
    savepoint.rollback()


def raises(shop: OutboxShop) -> None:
    shop.publish(1)
    raise ZeroDivisionError


def aborts(shop: OutboxShop) -> None:
    shop.publish(1)
    shop.session.flush()
    abort(409)


def commits(shop: OutboxShop) -> None:
    shop.publish(1)
    shop.session.commit()


def fails_to_flush(shop: OutboxShop) -> None:
    shop.publish(1)
    shop.session.add(shop.Order(name=None))
    with suppress(sa.exc.DBAPIError):
        shop.session.flush()


def was_known(shop: OutboxShop) -> None:
    commits(shop)
    shop.publish(2, event_id="one")
    shop.session.commit()
    shop.publish(2, event_id="one")


MEANT = [rolled_back, savepoint_rolled_back, raises, aborts, commits, fails_to_flush, was_known]


@pytest.mark.parametrize("action", MEANT)
def test_what_is_meant_is_not_warned_of(
    sqlite_shop: OutboxShop, action: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    shop = sqlite_shop

    @shop.app.post("/ping")
    def ping() -> dict[str, str]:
        action(shop)
        return {}

    shop.app.test_client().post("/ping")
    with suppress(ZeroDivisionError, Exception), shop.app.app_context():
        action(shop)
    assert not [one for one in warnings_of(caplog) if "without a commit" in one]


# --- a schema for each tenant


class Tenants:
    """A shop whose orders are in a schema of their own for each tenant."""

    def __init__(self, shop: OutboxShop) -> None:
        self.shop = shop
        with shop.app.app_context(), shop.db.engine.begin() as connection:
            self.url = shop.db.engine.url
            self.name = f"tenant_{self.url.database.replace('/', '_')[-12:].replace('.', '_')}"
            if connection.dialect.name != "sqlite":
                connection.exec_driver_sql(f"CREATE SCHEMA {self.name}")
            else:
                path = f"{self.url.database}.tenant"

                @sa.event.listens_for(shop.db.engine, "connect")
                def attach(driver: Any, _record: Any) -> None:
                    driver.execute(f"ATTACH DATABASE '{path}' AS {self.name}")

        with shop.app.app_context():
            shop.db.engine.dispose()
            with shop.db.engine.connect() as connection:
                mapped = connection.execution_options(schema_translate_map=self.map)
                shop.db.metadata.create_all(mapped)  # as a migration run for each tenant does
                mapped.commit()

    @property
    def map(self) -> dict[None, str]:
        return {None: self.name}

    def enter(self) -> None:
        self.shop.session.connection(execution_options={"schema_translate_map": self.map})

    def orders(self) -> list[str]:
        return [name for (name,) in self.shop.execute(f"SELECT name FROM {self.name}.orders")]


@pytest.fixture
def tenants(make_shop: MakeShop, new_url: str) -> Iterator[Tenants]:
    made = Tenants(make_shop(new_url, use_inbox=True))
    yield made
    if made.shop.engine.dialect.name == "mysql":
        made.shop.execute(f"DROP SCHEMA {made.name}")


@pytest.mark.parametrize("event_id", [None, "one"])
def test_event_of_a_tenant_is_relayed(tenants: Tenants, event_id: str | None) -> None:
    shop = tenants.shop
    with shop.app.app_context():
        tenants.enter()
        shop.session.add(shop.Order(name="a"))
        shop.publish(1, event_id=event_id)
        shop.session.commit()
        tenants.enter()
        shop.session.add(shop.Order(name="lost"))
        shop.publish(2, event_id=event_id and "two")
        shop.session.rollback()
        if event_id:
            tenants.enter()
            again = shop.pubsub.publish("order.created", {"n": 3}, event_id=event_id)
            assert again.duplicate
    assert (tenants.orders(), shop.orders, shop.numbers) == (["a"], [], [1])
    assert shop.relay().run_once() == 1


@pytest.mark.parametrize("kept_in", ["public", "shared"])
def test_tenant_of_the_search_path(
    make_shop: MakeShop, make_url: Callable[[str], str], kept_in: str
) -> None:
    """Each schema of a tenant has the tables too, as migrations make them."""
    shop = make_shop(make_url("postgresql"), use_inbox=True)
    with shop.engine.begin() as connection:
        for schema in ("tenant_1", "shared"):
            connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
        tenant = {"schema_translate_map": {None: "tenant_1"}}
        shop.db.metadata.create_all(connection.execution_options(**tenant))
    metadata = None if kept_in == "public" else sa.MetaData(schema="shared")
    app = Flask("shop")
    app.config.update(
        SQLALCHEMY_DATABASE_URI=shop.engine.url,
        NATSPUBSUB_URLS="memory://",
        NATSPUBSUB_USE_OUTBOX=True,
    )
    db = SQLAlchemy(app)
    order, _ = define_models(db)
    pubsub = NatsPubsub(app, db, metadata=metadata)
    with app.app_context():
        if metadata is not None:
            metadata.create_all(db.engine)
        for event_id in ("one", None):
            db.session.execute(sa.text("SET LOCAL search_path TO tenant_1, public"))
            db.session.add(order(name=event_id or "a"))
            pubsub.publish("order.created", {"n": 1}, event_id=event_id)
            db.session.commit()
    assert shop.execute("SELECT count(*) FROM tenant_1.orders")[0][0] == 2
    assert shop.execute("SELECT count(*) FROM tenant_1.natspubsub_outbox")[0][0] == 0
    assert pubsub.make_relay().run_once() == 2
    pubsub.shutdown()
    with app.app_context():
        db.engine.dispose()


def test_changes_of_a_tenant_are_relayed(tenants: Tenants) -> None:
    shop = tenants.shop
    shop.pubsub.publish_changes(shop.Order, "order")
    with shop.app.app_context():
        tenants.enter()
        shop.session.add(shop.Order(name="a"))
        shop.session.commit()
    assert len(shop.rows) == 1
    assert shop.relay().run_once() == 1


def test_handler_of_a_tenant_happens_once(tenants: Tenants) -> None:
    from flask_natspubsub.testing import TestBroker

    shop = tenants.shop

    @shop.pubsub.subscriber("order.paid", name="paid")
    def paid(message: dict[str, Any]) -> None:
        # The inbox has begun the transaction already, so the option is set on its connection.
        shop.session.connection().execution_options(schema_translate_map=tenants.map)
        shop.session.add(shop.Order(name=message["name"]))
        shop.publish(1)

    with TestBroker(shop.app) as broker:
        broker.deliver("order.paid", {"name": "a"}, event_id="one")
        broker.duplicate()
        broker.drain()
        assert broker.dead_letters == []
        assert [outcome.result for outcome in broker.outcomes] == ["handled", "skipped"]
        assert len(broker.published_to("order.created")) == 1
    assert (tenants.orders(), shop.orders) == (["a"], [])


def test_app_whose_engine_has_another_schema(make_shop: MakeShop, new_url: str) -> None:
    """All of its tables are there, those of the outbox too."""
    first = Tenants(make_shop(new_url))
    options = {"execution_options": {"schema_translate_map": first.map}}
    app = Flask("shop")
    app.config.update(
        SQLALCHEMY_DATABASE_URI=new_url,
        SQLALCHEMY_ENGINE_OPTIONS=options,
        NATSPUBSUB_URLS="memory://",
        NATSPUBSUB_USE_OUTBOX=True,
    )
    db = SQLAlchemy(app)
    order, _ = define_models(db)
    pubsub = NatsPubsub(app, db=db)
    with app.app_context():
        if new_url.startswith("sqlite"):
            path = f"{db.engine.url.database}.tenant"

            @sa.event.listens_for(db.engine, "connect")
            def attach(driver: Any, _record: Any) -> None:
                driver.execute(f"ATTACH DATABASE '{path}' AS {first.name}")

        db.session.add(order(name="a"))
        pubsub.publish("order.created", {"n": 1})
        pubsub.publish("order.created", {"n": 2}, event_id="two")
        db.session.commit()
    assert pubsub.make_relay().run_once() == 2
    assert pubsub.make_relay().run_once() == 0
    assert first.orders() == ["a"]
    assert first.shop.rows == []
    pubsub.shutdown()
    with app.app_context():
        db.engine.dispose()
    if first.shop.engine.dialect.name == "mysql":
        first.shop.execute(f"DROP SCHEMA {first.name}")


# --- a session that reads from a replica


class RoutingSession(Session):
    """As in SQLAlchemy's docs: what is written goes to the leader, all else to a follower."""

    def get_bind(self, mapper: Any = None, clause: Any = None, **_: Any) -> Any:
        if self._flushing or isinstance(clause, (sa.Update, sa.Delete)):
            return self._db.engines[None]
        return self._db.engines["replica"]


class FlushingSession(Session):
    """As an older edition of those had it."""

    def get_bind(self, mapper: Any = None, clause: Any = None) -> Any:  # type: ignore[override]
        return self._db.engines[None if self._flushing else "replica"]


@pytest.mark.parametrize("session_class", [RoutingSession, FlushingSession])
def test_session_that_reads_from_a_replica(
    tmp_path: Any, env: str, caplog: Any, session_class: type
) -> None:
    app = Flask("shop")
    app.config.update(
        SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path}/leader.db",
        SQLALCHEMY_BINDS={"replica": f"sqlite:///{tmp_path}/replica.db"},
        NATSPUBSUB_URLS="memory://",
        NATSPUBSUB_ENV=env,
        NATSPUBSUB_USE_OUTBOX=True,
        NATSPUBSUB_USE_INBOX=True,
    )
    db = SQLAlchemy(app, session_options={"class_": session_class})
    order, _ = define_models(db)
    pubsub = NatsPubsub(app, db=db)

    @pubsub.subscriber("order.paid", name="paid")
    def paid(message: dict[str, Any]) -> None:
        db.session.add(order(name=message["name"]))
        pubsub.publish("order.closed", {}, event_id="closed")

    from flask_natspubsub.testing import TestBroker

    with TestBroker(app) as broker:
        with app.app_context():
            db.metadata.create_all(db.engines[None])
            db.session.add(order(name="a"))
            assert not pubsub.publish("order.created", {}, event_id="one").duplicate
            pubsub.publish("order.created", {})
            db.session.commit()
            assert pubsub.publish("order.created", {}, event_id="one").duplicate
        broker.deliver("order.paid", {"name": "b"}, event_id="paid")
        broker.duplicate()
        broker.drain()
        assert [one.result for one in broker.outcomes if one.topic == "order.paid"] == [
            "handled",
            "skipped",
        ]
        assert len(broker.published) == 4
    with app.app_context():
        with db.engine.connect() as connection:
            assert len(connection.execute(sa.select(order)).all()) == 2
        for engine in db.engines.values():
            engine.dispose()
    assert not [one for one in warnings_of(caplog) if "another database" in one]
