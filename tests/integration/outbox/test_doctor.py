"""``flask natspubsub doctor`` on a real server with its monitoring."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_natspubsub import NatsPubsub
from flask_natspubsub.cli import natspubsub
from tests.integration.helpers import api
from tests.support.servers import NatsServer

from .conftest import MakeShop
from .shop import OutboxShop, begin_before_savepoints, begin_transactions

pytestmark = pytest.mark.real_server


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    """A server of this file's own, which is monitored."""
    with NatsServer("http: 127.0.0.1:-1") as running:
        yield running


@pytest.fixture
def monitor(server: NatsServer) -> str:
    """The address of the server's monitoring."""
    (ports,) = server.folder.glob("*.ports")
    address: str = json.loads(ports.read_text())["monitoring"][0]
    return address


def doctor(shop: OutboxShop, *arguments: str) -> tuple[int, dict[str, Any]]:
    arguments = ("doctor", "--json", *arguments)
    result = shop.app.test_cli_runner().invoke(natspubsub, arguments)
    return result.exit_code, json.loads(result.stdout)


def codes(diagnosis: dict[str, Any]) -> set[str]:
    return {finding["code"] for finding in diagnosis["findings"]}


def test_a_sound_application_on_one_server(
    make_shop: MakeShop, sqlite: str, server: NatsServer, monitor: str
) -> None:
    shop = make_shop(sqlite, urls=server.url, monitor_url=monitor)
    begin_transactions(shop.engine)
    shop.broker.setup(shop.state.streams())

    code, found = doctor(shop)
    assert (code, found["grade"]) == (0, "C")
    assert codes(found) == {"sync-interval", "discard-old", "no-relay"}
    facts = found["facts"]["server"]
    assert (facts["sync_interval"], facts["sync_always"], facts["cluster_size"]) == (120, False, 1)
    assert facts["version"].startswith("2.")
    assert doctor(shop, "--fail-under", "C")[0] == 0
    assert doctor(shop, "--fail-under", "B")[0] == 1

    shop.start_relay()
    result = shop.app.test_cli_runner().invoke(natspubsub, ["doctor"])
    assert result.exit_code == 0
    assert "durability  C" in result.stdout
    assert "every 120 s" in result.stdout


def test_nothing_is_made_by_looking(make_shop: MakeShop, sqlite: str, server: NatsServer) -> None:
    shop = make_shop(sqlite, urls=server.url)
    runner = shop.app.test_cli_runner()
    result = runner.invoke(natspubsub, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert (result.exit_code, found["grade"]) == (1, "D")
    assert "stream-missing" in codes(found)
    assert "sync-unknown" in codes(found)
    assert shop.broker.stream_info(shop.state.settings.stream) is None


def test_a_monitoring_address_that_does_not_answer(
    make_shop: MakeShop, sqlite: str, server: NatsServer
) -> None:
    shop = make_shop(sqlite, urls=server.url)
    shop.broker.setup(shop.state.streams())
    code, found = doctor(shop, "--monitor-url", "http://127.0.0.1:1")
    assert code == 0
    assert "monitor" in codes(found)


def test_memory_and_async_streams(
    make_shop: MakeShop, sqlite: str, server: NatsServer, env: str
) -> None:
    body = {
        "name": f"{env}-events-stream",
        "subjects": [f"{env}.>"],
        "retention": "limits",
        "discard": "new",
    }
    shop = make_shop(sqlite, urls=server.url)
    for fault in ({"storage": "memory"}, {"storage": "file", "persist_mode": "async"}):
        made = api(server.url, f"STREAM.CREATE.{env}-events-stream", body | fault)
        assert "error" not in made, made
        code, found = doctor(shop)
        assert (code, found["grade"]) == (1, "D")
        assert codes(found) & {"memory-storage", "persist-async"}
        result = shop.app.test_cli_runner().invoke(natspubsub, ["setup"])
        assert result.exit_code == 1
        assert "NATSPUBSUB_ALLOW_VOLATILE_STREAMS" in result.stderr
        api(server.url, f"STREAM.DELETE.{env}-events-stream")


def test_a_loss_that_is_not_repaired(make_shop: MakeShop, sqlite: str, server: NatsServer) -> None:
    shop = make_shop(sqlite, urls=server.url)
    shop.commit(1, 2)
    assert shop.relay().run_once() == 2
    api(server.url, f"STREAM.DELETE.{shop.state.settings.stream}")
    shop.broker.setup(shop.state.streams())
    assert shop.relay().run_once() == 0

    code, found = doctor(shop)
    assert (code, found["grade"]) == (1, "D")
    assert "rewound" in codes(found)


def test_a_driver_that_commits_at_the_release_of_a_savepoint(
    make_shop: MakeShop, url: str, server: NatsServer
) -> None:
    shop = make_shop(url, urls=server.url)
    shop.broker.setup(shop.state.streams())
    assert ("sqlite-savepoints" in codes(doctor(shop)[1])) == (shop.engine.dialect.name == "sqlite")


@pytest.mark.parametrize("mend", [begin_transactions, begin_before_savepoints])
def test_a_driver_that_was_mended(
    make_shop: MakeShop, sqlite: str, server: NatsServer, mend: Callable[[Any], None]
) -> None:
    shop = make_shop(sqlite, urls=server.url)
    mend(shop.engine)
    shop.broker.setup(shop.state.streams())
    assert "sqlite-savepoints" not in codes(doctor(shop)[1])
    with shop.app.app_context():
        with shop.session.begin_nested():
            shop.session.add(shop.Order(name="a"))
            shop.publish(1)
        shop.session.rollback()
    assert (shop.orders, shop.rows) == ([], [])


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 has brought autocommit")
def test_a_driver_without_autocommit(tmp_path: Path, env: str) -> None:
    options = {"connect_args": {"autocommit": False}}
    app = Flask("shop")
    app.config.update(
        SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path}/x.db",
        SQLALCHEMY_ENGINE_OPTIONS=options,
        NATSPUBSUB_URLS="memory://",
        NATSPUBSUB_ENV=env,
        NATSPUBSUB_USE_OUTBOX=True,
    )
    db = SQLAlchemy(app)
    pubsub = NatsPubsub(app, db)
    persistence = pubsub.state(app).persistence
    assert persistence is not None
    assert persistence.database.keeps_savepoints()
    with app.app_context():
        db.engine.dispose()
