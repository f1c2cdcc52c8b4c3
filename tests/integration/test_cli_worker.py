"""``flask natspubsub worker`` as a process: signals, burst, outages, errors."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.support.servers import NatsServer
from tests.support.waiting import eventually

from .project import TIMEOUT, Project

pytestmark = pytest.mark.real_server


def publish(project, jobs, **fields):
    """Publish jobs with these numbers through the app itself."""
    project.write(
        "publish_jobs.py",
        "from app import create_app, pubsub\n"
        "with create_app().app_context():\n"
        f"    pubsub.publish_many([('job.created', {{'n': n, **{fields!r}}}) for n in {jobs!r}])\n",
    )
    subprocess.run(
        [sys.executable, "publish_jobs.py"],
        cwd=project.folder,
        env=project.environment(),
        check=True,
        timeout=TIMEOUT,
    )


def once_each(jobs):
    return dict.fromkeys(jobs, 1)


def worker_with_prefetched_jobs(project):
    """Start a worker that has two jobs in its handlers' hands and eighteen waiting."""
    project.settings["CONCURRENCY"] = 20  # what another worker can have in its hands
    publish(project, range(200))
    worker = project.start_worker("--concurrency", "2")
    eventually(lambda: len(project.noted("end")) == 200, TIMEOUT)
    publish(project, range(200, 220), hold=True)
    eventually(lambda: project.unsettled() == (0, 20), TIMEOUT, "nothing was prefetched")
    eventually(lambda: len(project.noted("begin")) == 202)
    return worker


def test_sigterm_finishes_what_has_begun_and_hands_back_the_rest(project):
    worker = worker_with_prefetched_jobs(project)
    worker.signal(signal.SIGTERM)

    other = project.start_worker()
    eventually(lambda: len(project.noted("begin")) == 220, TIMEOUT, "nothing was handed back")
    assert len(project.noted("end")) == 200, "nothing is finished yet"
    project.release()

    assert worker.wait() == 0
    assert worker.log.count("handled") == 202
    eventually(lambda: project.unsettled() == (0, 0), TIMEOUT)
    assert other.stop() == 0
    assert project.noted("begin") == once_each(range(220))
    assert project.noted("end") == once_each(range(220))


def test_sigint_ends_in_order_too(project):
    publish(project, [1])
    worker = project.start_worker()
    eventually(lambda: project.noted("end") == {1: 1}, TIMEOUT)

    worker.signal(signal.SIGINT)

    assert worker.wait() == 0
    assert "Traceback" not in worker.log


def test_a_second_signal_ends_at_once_and_hands_back_what_is_in_hand(project):
    worker = worker_with_prefetched_jobs(project)
    worker.signal(signal.SIGTERM)
    worker.wait_for_log("SIGTERM: finishing")

    worker.signal(signal.SIGTERM)

    assert worker.wait(5) == 1
    assert len(project.noted("end")) == 200
    project.release()
    assert project.run("worker", "--burst").returncode == 0
    assert project.noted("end") == once_each(range(220))


DEADLY = """
import os
import signal

from app import pubsub


@pubsub.subscriber("job.created", name="work", concurrency=4)
def work(message):
    if message.get("how") == "exit":
        os._exit(9)
    if message.get("how") == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_handler_that_kills_the_worker_takes_no_line_of_settled_messages_along(project, how):
    project.write("handlers.py", DEADLY)
    publish(project, range(2000))
    publish(project, [2000], how=how)
    publish(project, range(2001, 4000))

    worker = project.start_worker()

    assert worker.wait() in (9, -signal.SIGKILL)
    pending, in_hand = project.unsettled()
    settled = 4000 - pending - in_hand
    assert settled > 0
    assert worker.log.count("handled") >= settled


def test_the_last_lines_are_in_the_log_of_a_worker_that_ends_at_once(project):
    publish(project, range(500))
    publish(project, [500], hold=True)
    worker = project.start_worker()
    eventually(lambda: len(project.noted("end")) == 500, TIMEOUT)

    worker.signal(signal.SIGTERM)
    worker.wait_for_log("SIGTERM: finishing")
    worker.signal(signal.SIGTERM)

    assert worker.wait(5) == 1
    assert worker.log.count("handled") == 500


def test_handlers_that_do_not_finish_in_time_are_left_behind(project):
    project.settings["SHUTDOWN_TIMEOUT"] = 0.2
    publish(project, [1], hold=True)
    worker = project.start_worker()
    eventually(lambda: project.noted("begin") == {1: 1}, TIMEOUT)

    assert worker.stop() == 1

    assert "handlers are still running" in worker.log
    project.release()
    assert project.run("worker", "--burst").returncode == 0
    assert project.noted("end") == {1: 1}


def test_burst_ends_when_everything_and_what_follows_from_it_is_done(project):
    publish(project, range(50), then=True)

    done = project.run("worker", "--burst")

    assert done.returncode == 0
    assert project.noted("end") == once_each(range(50))
    assert project.noted("followed") == once_each(range(50))


def test_burst_with_nothing_to_do_ends(project):
    assert project.run("worker", "--burst").returncode == 0


def test_burst_waits_for_retries(project):
    publish(project, [1], fail=True)

    assert project.run("worker", "--burst").returncode == 0

    assert project.noted("begin") == {1: 2}
    assert [letter["subscriber"] for letter in project.json("dlq", "list")] == ["work"]


def test_only_runs_the_named_subscriber(project):
    publish(project, [1], then=True)

    done = project.run("worker", "--only", "work", "--burst")

    assert done.returncode == 0
    assert project.noted("end") == {1: 1}
    assert not project.noted("followed")
    assert "follow" not in done.stderr


def test_an_unknown_name_is_misuse_and_the_known_ones_are_said(project):
    done = project.run("worker", "--only", "wrok")

    assert done.returncode == 2
    assert "'wrok'" in done.stderr
    assert "follow, work" in done.stderr


def test_no_subscribers_is_a_failure_with_a_hint(project):
    project.settings["SUBSCRIBERS"] = []

    done = project.run("worker")

    assert done.returncode == 1
    assert "NATSPUBSUB_SUBSCRIBERS" in done.stderr


def test_the_banner_and_the_logs_go_to_stderr(project):
    project.settings["URLS"] = project.url.replace("nats://", "nats://bob:secret@")
    publish(project, [1])

    done = project.run("worker", "--burst", "--concurrency", "3")

    assert done.stdout == ""
    assert "nats://***@127.0.0.1" in done.stderr
    assert "secret" not in done.stderr
    assert f"{project.env}-events-stream" in done.stderr
    assert "work    job.created  (3 at once)" in done.stderr
    line = next(line for line in done.stderr.splitlines() if "handled" in line)
    assert "INFO    job.created" in line
    assert "work #1" in line


def test_the_apps_own_logging_is_left_alone(project):
    app = (project.folder / "app.py").read_text()
    project.write(
        "app.py",
        "import logging, sys\n"
        "logging.basicConfig(format='mine %(message)s', level='INFO', stream=sys.stderr)\n" + app,
    )
    publish(project, [1])

    done = project.run("worker", "--burst")

    assert "mine job.created" in done.stderr
    assert "INFO    job.created" not in done.stderr


def test_missing_streams_without_auto_setup_are_a_failure(project):
    project.settings["AUTO_SETUP"] = False

    done = project.run("worker")

    assert done.returncode == 1
    assert "flask natspubsub setup" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_waits_for_a_server_that_is_down(tmp_path):
    with NatsServer() as server:
        project = Project(tmp_path, server.url)
        publish(project, [1])
        server.stop()
        worker = project.start_worker()
        try:
            worker.wait_for_log("Still trying")
            server.start()
            up = time.monotonic()
            eventually(lambda: project.noted("end") == {1: 1}, TIMEOUT)
            assert time.monotonic() - up < 5
            assert worker.log.count("Still trying") == 1
            assert worker.stop() == 0
        finally:
            project.close()


def test_a_burst_fails_where_the_server_is_missing(tmp_path):
    with NatsServer() as server:
        project = Project(tmp_path, server.url)
        server.stop()

        done = project.run("worker", "--burst")

        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("Error: ")
        assert "Traceback" not in done.stderr
        project.close()


def test_sigterm_ends_a_worker_that_still_waits_for_a_server(tmp_path):
    with NatsServer() as server:
        project = Project(tmp_path, server.url)
        server.stop()
        worker = project.start_worker()
        try:
            worker.wait_for_log("Still trying")
            assert worker.stop() == 0
        finally:
            project.close()


def test_streams_that_come_later_than_the_worker_are_found(tmp_path):
    with NatsServer() as server:
        project = Project(tmp_path, server.url, AUTO_SETUP=False)
        server.stop()
        worker = project.start_worker()
        try:
            worker.wait_for_log("Still trying")
            worker.wait_for_log("started")
            server.start()
            worker.wait_for_log("connected to NATS")
            assert project.run("setup").returncode == 0
            publish(project, [1])
            eventually(lambda: project.noted("end") == {1: 1}, TIMEOUT)
            assert worker.stop() == 0
        finally:
            project.close()
