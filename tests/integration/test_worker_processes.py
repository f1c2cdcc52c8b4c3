"""``worker --processes``: what dies or hangs is replaced, and the end is orderly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from tests.support.servers import NatsServer
from tests.support.waiting import eventually

from .project import APP, HANDLERS, Project

pytestmark = pytest.mark.real_server

TIMEOUT = 45

#: Says which process handled a job, and does what kills or blocks a process.
MORE = """
import os
import time


@pubsub.subscriber("hard.created", backoff=[0.05], max_deliver=2, ack_wait=1, timeout=1)
def hard(message, context):
    note("hard", message["n"])
    if message.get("die"):
        os._exit(9)
    if message.get("hang"):
        threading.Event().wait()


@pubsub.subscriber("job.created", name="where")
def where(message):
    note("pid", os.getpid())
"""

BREAKABLE = "import os, pathlib\nif pathlib.Path('broken').exists():\n    os._exit(7)\n"


@pytest.fixture
def project(tmp_path, server):
    made = Project(tmp_path, server.url)
    made.write("handlers.py", HANDLERS + MORE)
    yield made
    made.close()


class Supervised:
    """A running ``worker --processes 2``, and what its health port says."""

    def __init__(self, project, *arguments):
        self.worker = project.start_worker(
            "--processes", "2", "--health-port", "0", "--concurrency", "4", *arguments
        )
        eventually(lambda: re.search(r"http://\S+", self.log), TIMEOUT)
        self.url = re.search(r"http://\S+", self.log)[0]
        self.wait_until_up()

    @property
    def log(self):
        return self.worker.log

    def wait_for_log(self, pattern, count=1):
        eventually(lambda: len(re.findall(pattern, self.log)) >= count, TIMEOUT, pattern)

    def stop(self):
        self.worker.signal(signal.SIGTERM)
        return self.worker.wait(TIMEOUT)

    def pids(self):
        checks = get(self.url + "detailed")[1]["checks"]
        return [row["pid"] for row in checks.values() if row["status"] == "ok"]

    def wait_until_up(self, *, without=()):
        """Wait until two processes are well, none of them one of ``without``."""

        def up():
            pids = self.pids()
            return len(pids) == 2 and not set(pids) & set(without)

        eventually(up, TIMEOUT, "not two processes up", 0.05)


def get(url):
    """Return code and body."""
    try:
        with urlopen(url, timeout=TIMEOUT) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        with error:
            return error.code, json.load(error)


def publish(project, topic, messages):
    project.write(
        "publish.py",
        "from app import create_app, pubsub\n"
        "with create_app().app_context():\n"
        f"    pubsub.publish_many([({topic!r}, message) for message in {messages!r}])\n",
    )
    command = [sys.executable, "publish.py"]
    environment = project.environment()
    subprocess.run(command, cwd=project.folder, env=environment, check=True, timeout=TIMEOUT)


def is_gone(pid):
    """Whether a process has ended, even if nobody has asked how."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_two_processes_share_the_work_and_sigterm_to_all_of_them_is_one_end_in_order(project):
    supervised = Supervised(project)
    publish(project, "job.created", [{"n": n, "hold": n >= 1400} for n in range(1500)])
    eventually(lambda: len(set(project.noted("pid"))) == 2, TIMEOUT, "one did all the work")
    eventually(lambda: len(project.noted("end")) > 200, TIMEOUT)

    # As a service manager does, which knows nothing of who passes what on.
    for pid in supervised.pids():
        os.kill(pid, signal.SIGTERM)
    supervised.worker.signal(signal.SIGTERM)
    supervised.wait_for_log("(SIGTERM|the parent process): finishing", 2)
    project.release()

    assert supervised.worker.wait(TIMEOUT) == 0
    assert "again" not in supervised.log
    before = len(project.noted("end"))
    assert project.run("worker", "--burst", "--processes", "2").returncode == 0
    assert project.noted("begin") == dict.fromkeys(range(1500), 1), "something was redelivered"
    assert before < 1500, "it was not under load"


def test_a_second_signal_ends_all_at_once_and_nothing_is_lost(project):
    supervised = Supervised(project)
    publish(project, "job.created", [{"n": n, "hold": True} for n in range(8)])
    eventually(lambda: len(project.noted("begin")) == 8, TIMEOUT)
    supervised.worker.signal(signal.SIGTERM)
    supervised.wait_for_log("the parent process: finishing", 2)

    supervised.worker.signal(signal.SIGTERM)

    assert supervised.worker.wait(15) == 1
    project.release()
    assert project.run("worker", "--burst").returncode == 0
    assert project.noted("end") == dict.fromkeys(range(8), 1)


def test_what_is_killed_or_hangs_is_replaced_and_everything_is_handled(project):
    project.settings |= {"ACK_WAIT": 3, "HEARTBEAT_TIMEOUT": 3}
    supervised = Supervised(project)
    killed, stopped = supervised.pids()
    publish(project, "job.created", [{"n": n, "hold": True} for n in range(8)])
    eventually(lambda: len(project.noted("begin")) == 8, TIMEOUT)

    os.kill(killed, signal.SIGKILL)
    os.kill(stopped, signal.SIGSTOP)
    project.release()

    supervised.wait_until_up(without=[killed, stopped])
    eventually(lambda: len(project.noted("end")) == 8, TIMEOUT)
    assert is_gone(stopped)
    assert f"({killed}) was killed by SIGKILL; another is started" in supervised.log
    assert re.search(rf"\({stopped}\): no sign of life for \d s: killing it", supervised.log)
    assert supervised.stop() == 0


def test_messages_that_kill_or_block_a_process_become_dead_letters(project):
    project.settings["HEARTBEAT_TIMEOUT"] = 3
    supervised = Supervised(project)
    publish(project, "hard.created", [{"n": 1, "hang": True}])

    def subscribers():
        return [letter["subscriber"] for letter in project.json("dlq", "list")]

    supervised.wait_for_log("beyond its time limit: replacing it")
    publish(project, "hard.created", [{"n": 2, "die": True}])
    supervised.wait_for_log(r"hard #\d .* dead_lettered")
    eventually(lambda: subscribers() == ["hard", "hard"], TIMEOUT, "not two dead letters", 0.5)
    publish(project, "hard.created", [{"n": 3}])
    eventually(lambda: project.noted("hard")[3] == 1, TIMEOUT)
    assert supervised.stop() == 0


def test_a_crash_loop_ends_with_1_and_says_so(project):
    project.write("app.py", BREAKABLE + APP)
    supervised = Supervised(project)
    project.write("broken", "")

    os.kill(supervised.pids()[0], signal.SIGKILL)

    assert supervised.worker.wait(TIMEOUT) == 1
    assert supervised.log.count("another is started in") == 4
    assert re.search(r"ended with 7: 5 times within 60 s; ending with 1", supervised.log)
    assert "Traceback" not in supervised.log


def test_sighup_restarts_the_processes_one_after_the_other(project):
    supervised = Supervised(project)
    before = supervised.pids()

    supervised.worker.signal(signal.SIGHUP)

    supervised.wait_until_up(without=before)
    publish(project, "job.created", [{"n": 1}])
    eventually(lambda: project.noted("end") == {1: 1}, TIMEOUT)
    assert supervised.stop() == 0
    assert "another is started" not in supervised.log


@pytest.mark.parametrize(
    "option", [["--processes", "2"], ["--reload"]], ids=["processes", "reload"]
)
def test_children_end_when_their_parent_is_killed(project, option):
    worker = project.start_worker(*option)
    worker.wait_for_log("started", len(option))
    children = [int(pid) for pid in re.findall(r"\[(\d+)\] started", worker.log)]
    children = children or [int(re.search(r"process (\d+)", worker.log)[1])]
    assert len(children) == len(option)

    worker.signal(signal.SIGKILL)

    eventually(lambda: all(map(is_gone, children)), 20, "children were left running")
    assert worker.log.count("the parent process is gone") == len(children)


def test_the_health_port_of_one_process(tmp_path):
    with NatsServer() as server:
        project = Project(tmp_path, server.url)
        try:
            worker = project.start_worker("--health-port", "0")
            worker.wait_for_log("started")
            url = re.search(r"http://127\.0\.0\.1:\S+", worker.log)[0]
            well = {"status": "ok", "failed": []}
            eventually(lambda: get(url + "ready") == (200, well), TIMEOUT)
            server.kill()

            eventually(lambda: get(url + "ready")[0] == 503, TIMEOUT)

            assert "nats" in get(url + "ready")[1]["failed"]
            assert get(url + "live") == (200, {"status": "ok"})
            loops = get(url + "detailed")[1]["checks"]["loops"]["seconds"]
            assert {"monitor", "handler threads", "subscriber work"} <= loops.keys()
            assert get(url + "payloads")[0] == 404
            assert worker.stop() == 0
        finally:
            project.close()


def test_a_health_port_that_is_taken_is_a_failure(project, server):
    done = project.run("worker", "--health-port", str(server.port))

    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{server.port}" in done.stderr
    assert "Traceback" not in done.stderr
