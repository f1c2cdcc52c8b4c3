"""``flask natspubsub relay``, and the worker's relay, as processes."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from flask_natspubsub.outbox.upkeep import LEASE_SECONDS
from tests.support.servers import NatsServer
from tests.support.waiting import eventually, for_seconds

from .project import TIMEOUT, Project

pytestmark = pytest.mark.real_server

APP = """
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_natspubsub import NatsPubsub

db = SQLAlchemy()
pubsub = NatsPubsub()


def create_app():
    app = Flask("shop", instance_path=r"{folder}")
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///shop.db"
    app.config["NATSPUBSUB_USE_OUTBOX"] = True
    app.config["NATSPUBSUB_SUBSCRIBERS"] = ["handlers"]
    app.config.from_prefixed_env()
    db.init_app(app)
    pubsub.init_app(app, db)
    return app
"""


class OutboxProject(Project):
    """A project that publishes through the outbox of a SQLite file."""

    def __init__(self, folder, url, **settings):
        super().__init__(folder, url, **settings)
        self.write("app.py", APP.replace("{folder}", str(folder)))

    def python(self, *lines):
        """Run lines in the app's context."""
        code = "from app import create_app, db, pubsub\nwith create_app().app_context():\n"
        self.write("script.py", code + "".join(f"    {line}\n" for line in lines))
        subprocess.run(
            [sys.executable, "script.py"],
            cwd=self.folder,
            env=self.environment(),
            check=True,
            timeout=TIMEOUT,
        )

    def create_tables(self):
        self.python("db.create_all()")

    def publish(self, *jobs, **fields):
        publish = (
            f"pubsub.publish_many([('job.created', {{'n': n, **{fields!r}}}) for n in {jobs}])"
        )
        self.python(publish, "db.session.commit()")

    def query(self, sql):
        with closing(sqlite3.connect(self.folder / "shop.db", timeout=10)) as connection:
            return connection.execute(sql).fetchall()

    def count(self, status):
        sql = f"SELECT count(*) FROM natspubsub_outbox WHERE status = '{status}'"
        return self.query(sql)[0][0]

    def holder(self):
        """Who has the lease now; None if nobody."""
        (lease,) = self.json("outbox", "status")["leases"]
        return lease["owner"]

    def start_relay(self, *arguments):
        return self.start("relay", *arguments)


@pytest.fixture
def project(tmp_path, server):
    made = OutboxProject(tmp_path, server.url)
    made.create_tables()
    yield made
    made.close()


def test_a_relay_sends_what_is_there_and_what_comes(project):
    project.publish(1, 2)
    relay = project.start_relay()
    eventually(lambda: project.count("sent") == 2, TIMEOUT, "nothing was sent")
    project.publish(3)
    eventually(lambda: project.count("sent") == 3, TIMEOUT, "nothing more was sent")

    assert relay.stop() == 0
    assert "stopped" in relay.log
    assert f"Relay of shop in {project.env}" in relay.log
    assert "Traceback" not in relay.log
    stored = project.query("SELECT stream, stream_sequence FROM natspubsub_outbox ORDER BY id")
    assert stored == [(project.names.stream, number) for number in (1, 2, 3)]


def test_sigterm_gives_the_lease_back_at_once(project):
    relay = project.start_relay()
    relay.wait_for_log("relaying partition 0")
    assert project.holder() is not None

    assert relay.stop() == 0

    assert project.holder() is None


def test_a_stand_by_takes_over_at_once_when_a_relay_is_stopped(project):
    first = project.start_relay()
    first.wait_for_log("relaying partition 0")
    second = project.start_relay()
    second.wait_for_log("started")
    stopped = time.monotonic()
    assert first.stop() == 0

    second.wait_for_log("relaying partition 0")
    assert time.monotonic() - stopped < LEASE_SECONDS / 2
    project.publish(1)
    eventually(lambda: project.count("sent") == 1, TIMEOUT)


def test_a_second_signal_ends_it_even_while_the_database_does_not_answer(project):
    relay = project.start_relay()
    relay.wait_for_log("relaying partition 0")
    blocker = sqlite3.connect(project.folder / "shop.db", isolation_level=None)
    with closing(blocker):
        blocker.execute("BEGIN EXCLUSIVE")
        relay.signal(signal.SIGTERM)
        relay.wait_for_log("SIGTERM: finishing the batch in hand")
        relay.signal(signal.SIGTERM)
        assert relay.wait() in (0, 1)  # 0 if it was between two statements
        blocker.execute("ROLLBACK")


def test_a_relay_waits_for_a_server_that_is_down(tmp_path):
    with NatsServer() as server:
        project = OutboxProject(tmp_path, server.url)
        project.create_tables()
        server.stop()
        project.publish(1)
        relay = project.start_relay()
        try:
            relay.wait_for_log("the relay cannot send")
            server.start()
            eventually(lambda: project.count("sent") == 1, TIMEOUT, "it has not come back")
            server.stop()
            assert relay.stop() == 0
        finally:
            project.close()


def test_a_relay_waits_for_the_tables_and_says_so(tmp_path, server):
    project = OutboxProject(tmp_path, server.url)
    relay = project.start_relay()
    try:
        relay.wait_for_log("'flask natspubsub outbox ddl' prints the SQL")
        project.create_tables()
        project.publish(1)
        eventually(lambda: project.count("sent") == 1, TIMEOUT)
    finally:
        project.close()


def test_relay_once_prints_one_json_value(project):
    project.publish(1, 2)

    assert project.json("relay", "--once") == {"sent": 2}
    assert project.holder() is None


def test_relay_once_fails_while_the_server_is_down(tmp_path):
    with NatsServer() as server:
        project = OutboxProject(tmp_path, server.url, CONNECT_TIMEOUT=0.5)
        project.create_tables()
        server.stop()
        project.publish(1)

        done = project.run("relay", "--once")

        assert done.returncode == 1
        assert "No connection" in done.stderr
        assert "Traceback" not in done.stderr
        assert project.holder() is None
        assert project.count("pending") == 1


# --- the worker


def test_a_worker_relays_what_its_handlers_publish(project):
    project.publish(1, 2, then=True)

    done = project.run("worker", "--burst")

    assert done.returncode == 0
    assert "outbox       relayed by this worker" in done.stderr
    assert project.noted("end") == {1: 1, 2: 1}
    assert project.count("pending") == 0
    assert project.holder() is None


@pytest.mark.parametrize("arguments", [(), ("--no-relay",), ("--processes", "2")])
@pytest.mark.parametrize("table", ["outbox", "inbox", "lease"])
def test_a_burst_before_the_migration_fails_and_says_why(project, table, arguments):
    project.settings["USE_INBOX"] = True
    project.publish(1)
    project.python(f"db.session.execute(db.text('DROP TABLE natspubsub_{table}'))")

    done = project.run("worker", "--burst", *arguments)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: The tables of the outbox")
    assert "Traceback" not in done.stderr


def test_a_burst_whose_tables_go_meanwhile_fails_too(project):
    project.write(
        "handlers.py",
        "from app import db, pubsub\n"
        "@pubsub.subscriber('job.created', name='work')\n"
        "def work(message):\n"
        "    db.session.execute(db.text('DROP TABLE natspubsub_outbox'))\n"
        "    db.session.commit()\n",
    )
    project.publish(1)
    assert project.run("relay", "--once").returncode == 0

    done = project.run("worker", "--burst")

    assert done.returncode == 1
    assert "Error: The tables of the outbox" in done.stderr


def test_a_worker_without_relay_leaves_the_outbox_alone(project):
    project.publish(1)
    worker = project.start_worker("--no-relay")
    worker.wait_for_log("started")
    assert "outbox       not relayed (--no-relay)" in worker.log
    for_seconds(1.5, lambda: project.count("pending") == 1 or pytest.fail("it was relayed"))

    assert project.run("relay", "--once").returncode == 0
    eventually(lambda: project.noted("end") == {1: 1}, TIMEOUT)
    assert worker.stop() == 0
    assert "relaying" not in worker.log


def test_a_worker_without_a_database_says_that_there_is_no_outbox(tmp_path, server):
    project = Project(tmp_path, server.url)

    done = project.run("worker", "--burst")

    assert "outbox       none" in done.stderr
    project.close()


def test_sigterm_gives_the_lease_of_a_worker_back(project):
    worker = project.start_worker()
    worker.wait_for_log("relaying partition 0")

    assert worker.stop() == 0

    assert project.holder() is None
