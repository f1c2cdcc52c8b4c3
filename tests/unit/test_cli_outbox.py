"""The commands of the outbox, the inbox and the relay, on a SQLite file and a memory broker."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_natspubsub import NatsPubsub
from flask_natspubsub.app.database import DIALECTS
from flask_natspubsub.brokers.memory.broker import MemoryBroker
from flask_natspubsub.cli import natspubsub
from tests.support.databases import sqlite_url
from tests.support.secrets import SECRET

DATABASE_COMMANDS = [
    ["outbox", "status"],
    ["outbox", "list"],
    ["outbox", "retry", "--all"],
    ["outbox", "purge", "--older-than", "7d"],
    ["inbox", "status"],
    ["inbox", "purge", "--older-than", "7d"],
    ["relay", "--once"],
]


class Site:
    """An app with an outbox, and the rows it has."""

    def __init__(self, url, *, tables=True, **settings):
        self.app = Flask("shop")
        self.app.config.from_mapping(
            SQLALCHEMY_DATABASE_URI=url,
            NATSPUBSUB_URLS="memory://",
            NATSPUBSUB_USE_OUTBOX=True,
            **{f"NATSPUBSUB_{key}": value for key, value in settings.items()},
        )
        self.db = SQLAlchemy(self.app)
        self.pubsub = NatsPubsub(self.app, self.db)
        self.state = self.app.extensions["natspubsub"]
        self.broker = MemoryBroker()
        self.broker.setup(self.state.streams())
        self.state.use_broker(self.broker)
        if tables:
            with self.app.app_context():
                self.db.create_all()

    def close(self):
        self.broker.close()
        with self.app.app_context():
            self.db.engine.dispose()

    def publish(self, *numbers, **options):
        with self.app.app_context():
            for number in numbers:
                self.pubsub.publish("order.created", {"n": number}, **options)
            self.db.session.commit()

    def update(self, **values):
        """Set columns of all rows of the outbox."""
        with self.app.app_context():
            table = self.state.persistence.store.table
            self.db.session.execute(table.update().values(**values))
            self.db.session.commit()

    def handled(self, *event_ids, subscriber="mailer", at=None):
        table = self.state.persistence.inbox.table
        rows = [{"event_id": one, "subscriber": subscriber} for one in event_ids]
        with self.app.app_context():
            self.db.session.execute(table.insert().values(processed_at=at or 0), rows)
            self.db.session.commit()

    def invoke(self, *arguments, stdin=None):
        return self.app.test_cli_runner().invoke(natspubsub, arguments, input=stdin)

    def json(self, *arguments):
        result = self.invoke(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def statuses(self):
        return {row["id"]: row["status"] for row in self.json("outbox", "list")}


@pytest.fixture
def make_site(tmp_path):
    made = []

    def make(**options):
        made.append(Site(sqlite_url(tmp_path), **options))
        return made[-1]

    yield make
    for site in made:
        site.close()


@pytest.fixture
def site(make_site):
    return make_site()


# --- what all of them share


@pytest.mark.parametrize("command", [*DATABASE_COMMANDS, ["outbox", "ddl"]], ids=" ".join)
def test_without_a_database_the_fix_is_said(command):
    app = Flask("shop")
    app.config["NATSPUBSUB_URLS"] = "memory://"
    NatsPubsub(app)

    result = app.test_cli_runner().invoke(natspubsub, command)

    assert result.exit_code == 1
    assert "the app has none" in result.stderr
    assert "NatsPubsub(app, db=db)" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("command", DATABASE_COMMANDS, ids=" ".join)
def test_without_the_tables_the_fix_is_said(make_site, command):
    result = make_site(tables=False).invoke(*command)

    assert result.exit_code == 1
    assert "flask natspubsub outbox ddl" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_the_commands_need_no_sqlalchemy_to_be_there():
    code = (
        "import sys, flask_natspubsub.cli as cli; cli.natspubsub.list_commands(None);"
        "sys.exit('sqlalchemy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=30)
    assert done.returncode == 0


# --- outbox status and list


def test_status_counts_and_says_how_long_the_oldest_waits(site):
    site.publish(1, 2)
    site.update(created_at=0)
    site.publish(3)

    text = site.invoke("outbox", "status").stdout
    value = site.json("outbox", "status")

    assert text.splitlines()[0].split() == ["pending", "3"]
    assert value.pop("oldest_pending_seconds") > 1e9
    leases = [{"partition": 0, "owner": None, "seconds_left": 0.0}]
    assert value == {"pending": 3, "sent": 0, "parked": 0, "leases": leases}


def test_status_of_an_empty_outbox(site):
    text = site.invoke("outbox", "status").stdout.splitlines()

    assert text[3].split() == ["oldest", "pending", "-"]
    assert text[-1].split() == ["0", "nobody", "0.0"]
    assert site.json("outbox", "status")["oldest_pending_seconds"] is None


def test_status_names_who_relays_each_partition(make_site):
    site = make_site(OUTBOX_PARTITIONS=2)
    leases = site.state.persistence.store.leases
    lease = leases.acquire("outbox/1", "host:12:ab")
    first, second = site.json("outbox", "status")["leases"]

    assert first == {"partition": 0, "owner": None, "seconds_left": 0.0}
    assert second["partition"] == 1
    assert second["owner"] == "host:12:ab"
    assert 8 < second["seconds_left"] <= 10
    assert "host:12:ab" in site.invoke("outbox", "status").stdout

    leases.release(lease)
    assert "host:12:ab" not in site.invoke("outbox", "status").stdout


def test_list_pages_and_filters(site):
    site.publish(1, 2)
    site.update(status="parked", last_error="too large")
    site.publish(3, ordering_key="order-3")

    def ids(*arguments):
        return [row["id"] for row in site.json("outbox", "list", *arguments)]

    assert ids() == [1, 2, 3]
    assert ids("--status", "parked") == [1, 2]
    assert ids("--status", "pending") == [3]
    assert ids("--limit", "2") == [1, 2]
    assert ids("--limit", "2", "--after", "2") == [3]


def test_list_says_all_about_a_row_but_its_payload(site):
    site.publish(1, event_id="event-1", ordering_key="order-1", delay=3600)
    (row,) = site.json("outbox", "list")

    assert row["event_id"] == "event-1"
    assert row["subject"] == "development.shop.order.created"
    assert row["ordering_key"] == "order-1"
    assert row["available_at"] > row["created_at"] > "2020-01-01T00:00:00"
    assert row["created_at"].endswith("+00:00")
    assert row["sent_at"] is None
    assert not {"payload", "headers"} & row.keys()


def test_list_is_a_table_that_says_when_there_is_more(site):
    assert site.invoke("outbox", "list").stdout == "No rows.\n"
    site.publish(1, 2, 3)
    site.update(last_error="\x1b[2J refused")

    part = site.invoke("outbox", "list", "--limit", "2")
    all_of_it = site.invoke("outbox", "list")

    assert part.stdout.splitlines()[0].split()[:3] == ["ID", "SINCE", "(UTC)"]
    assert len(part.stdout.splitlines()) == 3
    assert part.stderr == "There may be more: --after 2\n"
    assert "\\x1b[2J refused" in part.stdout
    assert all_of_it.stderr == ""


# --- outbox retry


def test_retry_has_parked_rows_sent_again(site):
    site.publish(1, 2)
    site.update(status="parked", attempts=10)

    result = site.invoke("outbox", "retry", "2")

    assert result.stdout == "to be sent again: 1\n"
    assert site.statuses() == {1: "parked", 2: "pending"}
    assert site.json("outbox", "retry", "--all") == {"action": "retry", "count": 1}
    assert site.statuses() == {1: "pending", 2: "pending"}


def test_retry_of_what_was_sent_or_is_not_there_fails(site):
    site.publish(1)
    site.update(status="parked")

    result = site.invoke("outbox", "retry", "1", "1", "77", "--json")

    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"action": "retry", "count": 1}
    assert "neither parked" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["1", "--all"], ["one"], ["0"]])
def test_retry_of_who_knows_what_is_misuse(site, arguments):
    assert site.invoke("outbox", "retry", *arguments).exit_code == 2


# --- purging


def test_purge_deletes_what_was_sent_long_ago(site):
    site.publish(1, 2)
    site.update(status="sent", sent_at=0)
    site.publish(3)

    assert site.json("outbox", "purge", "--older-than", "7d", "--yes") == {
        "action": "purge",
        "deleted": 2,
    }
    assert site.statuses() == {3: "pending"}
    assert site.invoke("outbox", "purge", "--older-than", "7d").stdout == "deleted 0\n"


def test_purge_deletes_parked_rows_if_asked_to(site):
    site.publish(1)
    site.update(status="parked", created_at=0)

    site.invoke("outbox", "purge", "--older-than", "7d", "--yes")
    assert site.statuses() == {1: "parked"}
    site.invoke("outbox", "purge", "--older-than", "7d", "--yes", "--status", "parked")
    assert site.statuses() == {}


def test_purge_goes_in_batches(site, monkeypatch):
    site.publish(*range(5))
    site.update(status="sent", sent_at=0)
    store, sizes = site.state.persistence.store, []
    delete = store.purge

    def small(status, older_than):
        sizes.append(delete(status, older_than, 2))
        return sizes[-1]

    monkeypatch.setattr(store, "purge", small)
    result = site.invoke("outbox", "purge", "--older-than", "1h", "--yes")

    assert result.stdout == "deleted 5\n"
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["outbox", "purge"], "--older-than"),
        (["outbox", "purge", "--older-than", "soon"], "30s, 10m"),
        (["outbox", "purge", "--older-than", "7d"], "delete 1 sent rows; add --yes"),
        (["outbox", "purge", "--older-than", "7d", "--status", "pending", "--yes"], "pending"),
        (["inbox", "purge", "--older-than", "7d"], "delete 1 rows of the inbox; add --yes"),
    ],
)
def test_a_purge_that_nobody_has_thought_about_is_misuse(site, arguments, hint):
    site.publish(1)
    site.update(status="sent", sent_at=0)
    site.handled("e1")

    result = site.invoke(*arguments)

    assert result.exit_code == 2
    assert hint in result.stderr
    assert site.statuses() == {1: "sent"}
    assert site.json("inbox", "status") == [{"subscriber": "mailer", "events": 1}]


@pytest.mark.parametrize(("answer", "left"), [("y", {}), ("n", {1: "sent", 2: "sent"})])
def test_on_a_terminal_a_purge_asks_and_shows_progress(site, monkeypatch, answer, left):
    monkeypatch.setattr("flask_natspubsub.cli.purging.is_terminal", lambda stream: True)
    site.publish(1, 2)
    site.update(status="sent", sent_at=0)

    result = site.invoke("outbox", "purge", "--older-than", "7d", stdin=f"{answer}\n")

    assert "Delete 2 sent rows?" in result.stderr
    assert ("deleting..." in result.stderr) == (answer == "y")
    assert "deleting" not in result.stdout
    assert site.statuses() == left


# --- outbox ddl


@pytest.mark.parametrize("dialect", DIALECTS)
def test_ddl_needs_no_connection(make_site, dialect, monkeypatch):
    site = make_site(tables=False)
    monkeypatch.setattr("sqlalchemy.Engine.connect", None)

    sql = site.invoke("outbox", "ddl", "--dialect", dialect).stdout

    for table in ("natspubsub_outbox", "natspubsub_lease", "natspubsub_inbox"):
        assert f"CREATE TABLE {table} (" in sql
    assert sql.rstrip().endswith(";")
    partial = "WHERE status = 'pending'" in sql
    assert partial == (dialect in ("sqlite", "postgresql"))


def test_ddl_is_for_the_apps_database_unless_told(make_site):
    site = make_site(tables=False)
    own = site.invoke("outbox", "ddl").stdout

    assert own == site.invoke("outbox", "ddl", "--dialect", "sqlite").stdout
    with site.app.app_context():
        connection = site.db.engine.raw_connection()
        connection.executescript(own)
        connection.close()
    site.publish(1)
    assert site.statuses() == {1: "pending"}


def test_ddl_of_an_unknown_database_is_misuse(site):
    result = site.invoke("outbox", "ddl", "--dialect", "oracle")

    assert result.exit_code == 2
    assert "postgresql" in result.stderr


# --- inbox


def test_inbox_status_counts_by_subscriber(site):
    assert site.invoke("inbox", "status").stdout == "The inbox is empty.\n"
    assert site.json("inbox", "status") == []
    site.handled("e1", "e2")
    site.handled("e1", subscriber="audit")

    assert site.json("inbox", "status") == [
        {"subscriber": "audit", "events": 1},
        {"subscriber": "mailer", "events": 2},
    ]
    table = site.invoke("inbox", "status").stdout.splitlines()
    assert [line.split() for line in table[1:]] == [["audit", "1"], ["mailer", "2"]]


def test_inbox_purge_forgets_the_old_ones(site):
    site.handled("e1", "e2")
    site.handled("e3", at=4e9)

    result = site.json("inbox", "purge", "--older-than", "30d", "--yes")

    assert result == {"action": "purge", "deleted": 2}
    assert site.json("inbox", "status") == [{"subscriber": "mailer", "events": 1}]


# --- relay


def test_relay_once_sends_what_is_due_and_ends(site):
    site.publish(1, 2)
    site.publish(3, delay=3600)

    assert site.json("relay", "--once") == {"sent": 2}
    assert site.statuses() == {1: "sent", 2: "sent", 3: "pending"}
    assert site.invoke("relay", "--once").stdout == "sent 0\n"
    assert site.json("outbox", "status")["leases"][0]["owner"] is None


def test_relay_once_says_when_somebody_else_has_the_lease(site):
    site.publish(1)
    leases = site.state.persistence.store.leases
    leases.acquire("outbox/0", "host:12:ab")

    result = site.invoke("relay", "--once", "--json")

    assert json.loads(result.stdout) == {"sent": 0}
    assert "another relay has their partition" in result.stderr


def test_relay_once_fails_while_the_server_is_away(site):
    site.publish(1)
    site.broker.disconnect()

    result = site.invoke("relay", "--once")

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ") or "\nError: " in result.stderr
    assert site.statuses() == {1: "pending"}


def test_relay_json_goes_with_once(site):
    assert site.invoke("relay", "--json").exit_code == 2


@pytest.mark.parametrize(
    "arguments", [*DATABASE_COMMANDS, ["doctor"], ["config"]], ids=lambda words: " ".join(words)
)
def test_no_command_shows_the_password_of_a_database_that_is_away(arguments):
    site = Site(f"postgresql+psycopg://shop:{SECRET}@127.0.0.1:1/shop", tables=False)
    try:
        result = site.app.test_cli_runner().invoke(natspubsub, arguments)
    finally:
        site.close()
    assert result.exit_code == (0 if arguments == ["config"] else 1), result.output
    assert SECRET not in result.output
    assert SECRET not in result.stderr


def test_health_does_not_show_the_password_of_a_database_that_is_away():
    url = f"postgresql+psycopg://shop:{SECRET}@127.0.0.1:1/shop"
    site = Site(url, tables=False, HEALTH_URL_PREFIX="/health")
    try:
        answer = site.app.test_client().get("/health/detailed")
    finally:
        site.close()
    assert answer.status_code == 503
    assert SECRET not in answer.text
