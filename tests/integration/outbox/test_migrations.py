"""Flask-Migrate, ``db.create_all()`` and ``outbox ddl`` make the same tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flask_migrate
import pytest
import sqlalchemy as sa
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy

from flask_natspubsub import ConfigurationError, NatsPubsub
from flask_natspubsub.app.database import DIALECTS

from .conftest import KINDS, MakeShop, MakeUrl
from .shop import OutboxShop

TABLES = {"natspubsub_outbox", "natspubsub_lease", "natspubsub_stream", "natspubsub_inbox"}


def describe(url: str) -> dict[str, Any]:
    """The extension's tables as the database reports them."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    inspector = sa.inspect(engine)
    found = {}
    for table in sorted(TABLES & set(inspector.get_table_names())):
        found[table] = {
            "columns": [
                (one["name"], str(one["type"]), one["nullable"])
                for one in inspector.get_columns(table)
            ],
            "primary key": inspector.get_pk_constraint(table)["constrained_columns"],
            "indexes": sorted(
                (str(one["name"]), one["column_names"], json.dumps(condition_of(one)))
                for one in inspector.get_indexes(table)
                if not one.get("duplicates_constraint")
            ),
            "unique": [one["column_names"] for one in inspector.get_unique_constraints(table)],
        }
    return found


def condition_of(index: Any) -> str | None:
    """The condition of a partial index."""
    options = index.get("dialect_options", {})
    for name in ("postgresql_where", "sqlite_where"):
        if name in options:
            return str(options[name])
    return None


class Migrations:
    """An app on a database, and the folder with its migrations."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = str(folder)
        self._app = Flask("shop")
        self._app.config["SQLALCHEMY_DATABASE_URI"] = url
        self._app.config["NATSPUBSUB_URLS"] = "memory://"
        self._app.config["NATSPUBSUB_USE_OUTBOX"] = True
        self._db = SQLAlchemy(self._app)

        class Order(self._db.Model):  # type: ignore[name-defined,misc]
            id = sa.Column(sa.Integer, primary_key=True)

        Migrate(self._app, self._db, folder)
        NatsPubsub(self._app, self._db)

    def do(self, command: Callable[..., None], **options: str) -> None:
        """Run the function behind a command of ``flask db``."""
        with self._app.app_context():
            command(self._folder, **options)
            self._db.engine.dispose()

    @property
    def scripts(self) -> list[str]:
        return [file.read_text() for file in Path(self._folder, "versions").glob("*.py")]


@pytest.mark.filterwarnings("ignore:'get_engine' is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_flask_migrate_creates_the_tables_and_then_finds_no_change(
    kind: str,
    make_url: MakeUrl,
    make_shop: MakeShop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The migrations would set up logging for the whole process.
    monkeypatch.setattr("logging.config.fileConfig", lambda name: None)
    url = make_url(kind)
    migrations = Migrations(tmp_path / "migrations", url)
    migrations.do(flask_migrate.init)
    migrations.do(flask_migrate.migrate, message="first")
    (script,) = migrations.scripts
    for table in TABLES:
        assert f"create_table('{table}'" in script
    migrations.do(flask_migrate.upgrade)

    other = make_url(kind)
    make_shop(other)
    assert set(describe(url)) == TABLES
    assert describe(url) == describe(other)

    with caplog.at_level("INFO"):
        migrations.do(flask_migrate.migrate, message="second")
    assert "No changes in schema detected" in caplog.text
    assert len(migrations.scripts) == 1

    shop = make_shop(url, tables=False)
    shop.commit(1, 2)
    assert shop.relay().run_once() == 2
    assert shop.sent == [1, 2]


def test_ddl_makes_the_same_tables_as_create_all(
    new_url: str, make_url: MakeUrl, make_shop: MakeShop, request: pytest.FixtureRequest
) -> None:
    empty = make_shop(new_url, tables=False)
    run_script(empty, ddl_of(empty))
    kind = "mysql" if new_url.startswith("mysql") else new_url.partition(":")[0].partition("+")[0]
    other = make_url(kind)
    make_shop(other)
    assert set(describe(new_url)) == TABLES
    assert describe(new_url) == describe(other)
    empty.commit(1)
    assert empty.relay().run_once() == 1


def ddl_of(shop: OutboxShop, dialect: str | None = None) -> str:
    assert shop.state.persistence is not None
    ddl: str = shop.state.persistence.ddl(dialect)
    return ddl


def run_script(shop: OutboxShop, script: str) -> None:
    with shop.engine.begin() as connection:
        for statement in script.split(";"):
            if statement.strip():
                connection.exec_driver_sql(statement.replace("%", "%%"))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_ddl_of_each_dialect(sqlite_shop: OutboxShop, dialect: str) -> None:
    """It needs no connection, and no driver, of the database it is for."""
    script = ddl_of(sqlite_shop, dialect)
    assert script.count("CREATE TABLE") == 4
    assert script.count("CREATE INDEX") == 6
    assert ("WHERE status = 'pending'" in script) == (dialect in ("sqlite", "postgresql"))
    assert ("LONGBLOB" in script) == (dialect in ("mysql", "mariadb"))


def test_ddl_of_an_unknown_dialect(sqlite_shop: OutboxShop) -> None:
    with pytest.raises(ConfigurationError, match="sqlite, postgresql, mysql, mariadb"):
        ddl_of(sqlite_shop, "oracle")


def test_two_apps_share_one_metadata(make_shop: MakeShop, sqlite: str, env: str) -> None:
    """As in the tests of a project: one ``db``, and an app for each test."""
    shop = make_shop(sqlite)
    again = Flask("again")
    again.config.update(
        SQLALCHEMY_DATABASE_URI=sqlite,
        NATSPUBSUB_URLS="memory://",
        NATSPUBSUB_ENV=env,
        NATSPUBSUB_USE_OUTBOX=True,
    )
    shop.db.init_app(again)
    pubsub = NatsPubsub(again)
    with again.app_context():
        pubsub.publish("order.created", {"n": 1})
        shop.db.session.commit()
        shop.db.engine.dispose()
    pubsub.shutdown()
    assert shop.numbers == [1]
