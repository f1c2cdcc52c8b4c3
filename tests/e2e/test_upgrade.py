"""A site of version 0.1 is taken over while it works: its database, streams, consumers, letters."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.support.databases import PostgresServer
from tests.support.processes import Child
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.real_server

ROOT = Path(__file__).resolve().parents[2]
#: The last commit whose names had no app in them.
OLD = "7d93f9b"
POISON = 25

APP = f"""
import os, sys, time

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_natspubsub import NatsPubsub

app = Flask(os.environ.get("SITE_APP", "shop"))
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["SITE_DATABASE"]
app.config["NATSPUBSUB_ENV"] = "site"
app.config["NATSPUBSUB_USE_OUTBOX"] = app.config["NATSPUBSUB_USE_INBOX"] = True
app.config["NATSPUBSUB_BACKOFF"] = [0.05]
app.config["NATSPUBSUB_MAX_DELIVER"] = 2
app.config["NATSPUBSUB_ACK_WAIT"] = 3
app.config.from_prefixed_env()
db = SQLAlchemy(app)
pubsub = NatsPubsub(app, db)


class Order(db.Model):
    n = sa.Column(sa.Integer, primary_key=True)


class Effect(db.Model):
    id = sa.Column(sa.Integer, primary_key=True)
    n = sa.Column(sa.Integer)
    app = sa.Column(sa.String(20))


@pubsub.subscriber("order.made", name="mailer", producer="shop")
def mail(message):
    if message["n"] % {POISON} == 0 and "SITE_MENDED" not in os.environ:
        raise ValueError("poison")
    db.session.add(Effect(n=message["n"], app=app.name))


def order(first, last):
    with app.app_context():
        for n in range(first, last):
            db.session.add(Order(n=n))
            pubsub.publish("order.made", {{"n": n}}, event_id=f"order-{{n}}")
            db.session.commit()
    pubsub.shutdown(app)


if __name__ == "__main__":
    if sys.argv[1] == "init":
        with app.app_context():
            db.create_all()
    else:
        order(int(sys.argv[1]), int(sys.argv[2]))
"""


class Site:
    """A folder with the app, and its processes, each of the old or the new version."""

    def __init__(self, folder: Path, old: Path, url: str, database: str) -> None:
        self.folder, self._old = folder, old
        self._engine = sa.create_engine(database)
        self._environment = {"FLASK_NATSPUBSUB_URLS": url, "SITE_DATABASE": database}
        self._children: list[Child] = []
        (folder / "app.py").write_text(APP)

    def start(self, *command: str, old: bool = False, **environment: str) -> Child:
        child = Child(
            [sys.executable, *command],
            self.folder / f"log-{len(self._children)}",
            folder=self.folder,
            environment={
                "PYTHONDONTWRITEBYTECODE": "1",
                "PYTHONPATH": str(self._old) if old else str(ROOT),
                **self._environment,
                **environment,
            },
        )
        self._children.append(child)
        return child

    def worker(self, **options: Any) -> Child:
        return self.start("-m", "flask", "natspubsub", "worker", "--concurrency", "4", **options)

    def run(self, *command: str, old: bool = False, **environment: str) -> str:
        child = self.start(*command, old=old, **environment)
        assert child.wait(60) == 0, child.log
        return child.log

    def stop_all(self) -> None:
        """Stop the processes that still run."""
        for child in self._children:
            child.end(40)

    def rows(self, query: str) -> list[Any]:
        with self._engine.connect() as connection:
            return list(connection.execute(sa.text(query)))

    def effects(self, app: str = "shop") -> Counter[int]:
        return Counter(n for (n,) in self.rows(f"SELECT n FROM effect WHERE app = '{app}'"))

    def letters(self, app: str = "shop") -> list[dict[str, Any]]:
        text = self.run(
            "-c",
            "import sys; from flask.cli import main; main()",
            "natspubsub",
            "dlq",
            "list",
            "--json",
            SITE_APP=app,
        )
        found: list[dict[str, Any]] = json.loads(text)
        return found

    def close(self) -> None:
        for child in self._children:
            child.kill()
        self._engine.dispose()


@pytest.fixture(scope="module")
def old_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the old package, from the project's history."""
    command = ["git", "-C", str(ROOT), "archive", OLD, "flask_natspubsub"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"the history has no {OLD}: this is no whole clone")
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def site(
    tmp_path: Path, old_version: Path, postgres_server: PostgresServer, env: str
) -> Iterator[Site]:
    with ExitStack() as stack:
        server = stack.enter_context(NatsServer())
        made = Site(tmp_path, old_version, server.url, postgres_server.url(f"upgrade_{env}"))
        stack.callback(made.close)
        yield made


def test_a_rolling_deploy_under_load_loses_nothing_and_does_nothing_twice(site: Site) -> None:
    site.run("app.py", "init", old=True)
    first, second = site.worker(old=True), site.worker(old=True)
    orders = site.start("app.py", "1", "701", old=True)
    eventually(lambda: len(site.effects()) > 150, 60, "the old version does not work")

    third = site.worker()
    third.wait_for_log("connected", timeout=30)
    first.kill()
    more = site.start("app.py", "701", "1201")
    eventually(lambda: len(site.effects()) > 500, 60, "nothing goes on")
    fourth = site.worker()
    assert second.stop(40) == 0
    third.kill()
    assert orders.wait(60) == more.wait(60) == 0
    ordered = {n for (n,) in site.rows('SELECT n FROM "order"')}
    good = {n for n in ordered if n % POISON}
    assert len(ordered) == 1200
    eventually(lambda: set(site.effects()) >= good, 60, "effects are missing")
    eventually(lambda: len(site.letters()) >= len(ordered - good), 60, "letters are missing")

    # Letters of both versions are sent again, each to its effect.
    assert fourth.stop(40) == 0
    site.worker(SITE_MENDED="1")
    said = site.run("-m", "flask", "natspubsub", "dlq", "replay", "--all", "--yes", SITE_MENDED="1")
    assert "failed 0" in said
    eventually(lambda: set(site.effects()) == ordered, 60, "effects are missing")
    assert {n: times for n, times in site.effects().items() if times != 1} == {}
    assert site.letters() == []


def test_two_apps_that_shared_a_database_get_all_their_effects_once_both_are_new(
    site: Site,
) -> None:
    site.run("app.py", "init", old=True)
    for app in ("shop", "bill"):
        site.worker(old=True, SITE_APP=app)
    site.run("app.py", "1", "25", old=True)
    eventually(lambda: len(site.effects()) + len(site.effects("bill")) >= 24, 60, "nothing is done")
    site.stop_all()
    before = site.effects() + site.effects("bill")
    assert before == Counter(dict.fromkeys(range(1, 25), 1))  # half is missing: the old fault

    for app in ("shop", "bill"):
        site.worker(SITE_APP=app, SITE_MENDED="1")
    site.run("app.py", "101", "201")
    new = set(range(101, 201))
    eventually(lambda: new <= set(site.effects()), 60, "effects of the one are missing")
    eventually(lambda: new <= set(site.effects("bill")), 60, "effects of the other are missing")
    for app in ("shop", "bill"):
        assert {n: c for n, c in site.effects(app).items() if c != 1} == {}
