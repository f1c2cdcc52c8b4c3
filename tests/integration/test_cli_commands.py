"""The commands besides the worker, on a real server: what is on stdout and what on stderr."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading

import pytest

from tests.support.servers import free_port

from .project import TIMEOUT

pytestmark = pytest.mark.real_server


def streams(project):
    names = (project.names.stream, project.names.dead_letter_stream)
    return [name for name in names if project.broker.stream_info(name)]


@pytest.mark.parametrize(
    "arguments",
    [["subscribers"], ["setup", "--dry-run"], ["dlq", "list"], ["config"]],
    ids=" ".join,
)
def test_looking_changes_nothing_and_prints_one_json_value(project, arguments):
    """Also with AUTO_SETUP, which makes streams at the first connect of others."""
    assert isinstance(project.json(*arguments), list)
    assert streams(project) == []


def test_logs_and_warnings_do_not_disturb_json(project):
    project.settings["UNKNOWN_KEY"] = "1"
    app = (project.folder / "app.py").read_text()
    project.write("app.py", "import logging\nlogging.basicConfig(level='DEBUG')\n" + app)

    done = project.run("subscribers", "--json")

    assert [row["name"] for row in json.loads(done.stdout)] == ["work", "follow"]
    assert "connected to NATS" in done.stderr
    assert "UNKNOWN_KEY" in done.stderr


def test_setup_makes_the_streams_once(project):
    assert [change["action"] for change in project.json("setup")] == ["create", "create"]
    assert len(streams(project)) == 2
    assert [change["action"] for change in project.json("setup")] == ["ok", "ok"]


def test_setup_names_a_stream_that_is_in_the_way(project):
    project.run("setup")
    project.settings["STREAM_NAME"] = "another"

    done = project.run("setup")

    assert done.returncode == 1
    assert project.names.stream in done.stderr
    assert "Traceback" not in done.stderr


def test_no_server_is_a_failure_without_the_password(project):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        project.settings["URLS"] = f"nats://bob:secret@127.0.0.1:{nobody.getsockname()[1]}"
        project.settings |= {"CONNECT_TIMEOUT": 0.2, "PUBLISH_TIMEOUT": 0.2}
        for arguments in (["subscribers"], ["dlq", "list"], ["publish", "a.b", "{}"]):
            done = project.run(*arguments)
            assert done.returncode == 1, arguments
            assert "No connection to nats://***@127.0.0.1" in done.stderr
            assert "secret" not in done.stderr
            assert "Traceback" not in done.stderr
            assert done.stdout == ""


def test_an_app_without_the_extension(project):
    project.write("bare.py", "from flask import Flask\napp = Flask('bare')\n")

    done = project.run("subscribers", "--json", app="bare")

    assert done.returncode == 2
    assert done.stdout == ""
    assert "NatsPubsub(app)" in done.stderr


def test_publish_and_handle_and_look(project):
    receipt = project.json("publish", "job.created", '{"n": 1}', "--event-id", "e1")
    assert receipt["sequence"] == 1
    assert receipt["stream"] == project.names.stream
    assert project.run("publish", "job.created", "-", stdin='{"n": 2}').returncode == 0
    assert project.run("worker", "--burst").returncode == 0
    rows = {row["name"]: row for row in project.json("subscribers")}
    assert (rows["work"]["pending"], rows["work"]["ack_pending"]) == (0, 0)
    assert project.noted("end") == {1: 1, 2: 1}


def test_a_dead_letter_is_shown_replayed_and_discarded(project):
    project.run("publish", "job.created", '{"n": 1, "fail": true}', "--event-id", "e1")
    project.run("worker", "--burst")
    (letter,) = project.json("dlq", "list")
    assert letter["event_id"] == "e1"
    assert letter["error"] == "ValueError: cannot do job 1"

    assert project.json("dlq", "show", letter["id"])["body"]["message"] == {"n": 1, "fail": True}
    assert project.run("dlq", "replay", "--subscriber", "work").stdout == "replayed 1, failed 0\n"
    assert project.run("dlq", "list").stdout == "No dead letters.\n"

    project.run("worker", "--burst")
    assert project.noted("begin") == {1: 4}
    (again,) = project.json("dlq", "list")
    assert again["event_id"] == "e1"
    assert project.run("dlq", "discard", again["id"]).stdout == "discarded 1, failed 0\n"
    assert project.json("dlq", "list") == []


class Tail:
    """A running ``tail``."""

    def __init__(self, project, *arguments):
        self._process = subprocess.Popen(
            project.command("tail", *arguments),
            cwd=project.folder,
            env=project.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._watchdog = threading.Timer(TIMEOUT, self._process.kill)
        self._watchdog.start()
        self.heading = self._process.stderr.readline()

    def line(self):
        """Return the next line; an empty one if it has ended."""
        return self._process.stdout.readline()

    def interrupt(self):
        self._process.send_signal(signal.SIGINT)

    def end(self):
        """Return the exit code, and what was not read yet of stdout and stderr."""
        rest = self._process.communicate()
        self._watchdog.cancel()
        return self._process.returncode, *rest


def test_tail_shows_what_is_published_from_now_on(project):
    project.run("publish", "job.created", '{"n": 1}')
    tail = Tail(project, "job.*", "--count", "2", "--json")
    project.run("publish", "job.created", '{"n": 2}', "--trace-id", "t2")
    project.run("publish", "other.thing", '{"n": 3}')
    project.run("publish", "job.done", '{"n": 4}')

    code, stdout, _ = tail.end()

    shown = [json.loads(line) for line in stdout.splitlines()]
    assert code == 0
    assert [item["message"] for item in shown] == [{"n": 2}, {"n": 4}]
    assert shown[0]["topic"] == "job.created"
    assert shown[0]["producer"] == "shop"
    assert shown[0]["trace_id"] == "t2"


def test_tail_shows_hostile_bytes_harmlessly(project):
    project.run("setup")
    tail = Tail(project, "--count", "2")
    project.broker.connect(5)
    project.broker.send(f"{project.env}.shop.bad.bytes", b"\x1b[2J\xff")
    first = tail.line()
    project.run("publish", "job.created", r'{"text": "\u001b[2J"}', "--event-id", "order-000042")
    second = tail.line()

    assert tail.end() == (0, "", "")
    assert "\x1b" not in first + second
    assert "bad.bytes" in first
    assert "\\x1b[2J\\xff" in first
    assert second.split()[1:4] == ["job.created", "r-000042", "shop"]


def test_tail_ends_with_an_interrupt(project):
    tail = Tail(project)

    tail.interrupt()

    assert tail.end() == (0, "", "\n")


def test_dead_letters_are_in_a_tail_only_if_asked_for(project):
    project.run("publish", "job.created", '{"n": 1, "fail": true}')
    every, dead = Tail(project, "--count", "1"), Tail(project, "--producer", "dlq", "--count", "1")
    project.run("worker", "--burst")
    project.run("publish", "job.done", '{"n": 2}')

    assert every.line().split()[1] == "job.done"
    assert dead.line().split()[1] == "job.created"
    assert every.end()[0] == dead.end()[0] == 0


def test_server_runs_until_a_signal(project):
    port = free_port()
    server = project.start("server", "--port", str(port), "--store-dir", "streams")
    server.wait_for_log("Server is ready")
    project.settings["URLS"] = f"nats://127.0.0.1:{port}"
    assert [change["action"] for change in project.json("setup")] == ["create", "create"]
    assert (project.folder / "streams" / "jetstream").is_dir()
    assert server.stop() in (0, 1)  # the server's own habit after SIGTERM
    assert f"nats://127.0.0.1:{port}" in server.log
