"""Fixtures of databases, and of shops with an outbox in one."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.databases import MysqlServer, PostgresServer, sqlite_url
from tests.support.servers import NatsServer

from .shop import OutboxShop, begin_transactions

KINDS = ["sqlite", "postgresql", "mysql"]
MakeUrl = Callable[[str], str]
MakeShop = Callable[..., OutboxShop]


@pytest.fixture
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> MakeUrl:
    """Make the address of an empty database, given a kind: sqlite, postgresql or mysql."""

    def make(kind: str) -> str:
        name = f"t{uuid.uuid4().hex[:12]}"
        if kind == "sqlite":
            return sqlite_url(tmp_path, name)
        server: PostgresServer | MysqlServer
        server = request.getfixturevalue(
            "postgres_server" if kind == "postgresql" else "mysql_server"
        )
        return server.url(name)

    return make


@pytest.fixture(scope="session")
def shared_urls() -> dict[str, str]:
    """The databases on servers whose tables are used by one test after the other."""
    return {}


@pytest.fixture
def use_url(make_url: MakeUrl, shared_urls: dict[str, str]) -> MakeUrl:
    """Choose a database without rows, given a kind; only SQLite's has no tables either."""

    def use(kind: str) -> str:
        if kind == "sqlite":
            return make_url(kind)
        if kind not in shared_urls:
            shared_urls[kind] = make_url(kind)
        delete_rows(shared_urls[kind])
        return shared_urls[kind]

    return use


def delete_rows(url: str) -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        for table in sa.inspect(connection).get_table_names():
            connection.exec_driver_sql(f"DELETE FROM {table}")


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, use_url: MakeUrl) -> str:
    """A database without rows: the test runs once on each kind."""
    return use_url(request.param)


@pytest.fixture(params=KINDS)
def new_url(request: pytest.FixtureRequest, make_url: MakeUrl) -> str:
    """A database without tables: the test runs once on each kind."""
    return make_url(request.param)


@pytest.fixture
def sqlite(make_url: MakeUrl) -> str:
    """An empty SQLite database."""
    return make_url("sqlite")


@pytest.fixture
def postgresql(use_url: MakeUrl) -> str:
    """A PostgreSQL database without rows."""
    return use_url("postgresql")


@pytest.fixture
def make_shop(env: str) -> Iterator[MakeShop]:
    """Make shops on a database; keyword arguments are settings. Closed at the end."""
    with ExitStack() as stack:

        def make(url: str, **settings: Any) -> OutboxShop:
            return stack.enter_context(OutboxShop(url, **{"env": env, **settings}))

        yield make


@pytest.fixture
def shop(make_shop: MakeShop, url: str) -> OutboxShop:
    """A shop with a broker in memory, on each kind of database."""
    return make_shop(url)


@pytest.fixture
def sqlite_shop(make_shop: MakeShop, sqlite: str) -> OutboxShop:
    """A shop with a broker in memory, on SQLite."""
    return make_shop(sqlite)


@pytest.fixture
def nats_shop(make_shop: MakeShop, sqlite: str, nats_server: NatsServer) -> OutboxShop:
    """A shop on SQLite with a real server for a broker."""
    return make_shop(sqlite, urls=nats_server.url)


@pytest.fixture
def sqlite_begins(shop: OutboxShop) -> None:
    """Have the SQLite driver begin transactions at their begin, as SQLAlchemy's docs advise."""
    begin_transactions(shop.engine)
