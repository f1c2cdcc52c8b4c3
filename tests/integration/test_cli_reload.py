"""``worker --reload``: new code runs, broken code waits, signals reach the child."""

from __future__ import annotations

import re
import signal

import pytest

from tests.support.waiting import eventually

from .project import HANDLERS, TIMEOUT

pytestmark = pytest.mark.real_server


def handled_by(project, version):
    """Publish a job and wait until that version of the code has handled it."""
    number = len(project.journal()) + 1
    assert project.run("publish", "job.created", f'{{"n": {number}}}').returncode == 0
    line = f"end {number} {version}"
    eventually(lambda: line in project.journal(), TIMEOUT, f"no {line!r} in {project.journal()}")


def test_a_changed_file_is_run_and_a_signal_ends_parent_and_child(project):
    worker = project.start_worker("--reload")
    handled_by(project, 1)

    project.write("handlers.py", HANDLERS.replace("VERSION = 1", "VERSION = 22"))
    worker.wait_for_log(r"handlers\.py changed")
    worker.wait_for_log("Worker of shop", 2)
    handled_by(project, 22)

    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert len(re.findall("stopped", worker.log)) == 2, "each child ends in order"


def test_code_that_fails_waits_for_the_next_change(project):
    worker = project.start_worker("--reload")
    worker.wait_for_log("connected to NATS")

    project.write("handlers.py", "this is no Python")
    worker.wait_for_log("waiting for a change")
    project.write("handlers.py", HANDLERS.replace("VERSION = 1", "VERSION = 333"))

    handled_by(project, 333)
    assert worker.log.count("waiting for a change") == 1
    assert worker.stop() == 0


def test_a_signal_ends_a_parent_whose_child_has_failed(project):
    project.settings["SUBSCRIBERS"] = []
    worker = project.start_worker("--reload")
    worker.wait_for_log("waiting for a change")

    assert worker.stop() == 1


def test_reload_and_burst_exclude_each_other(project):
    done = project.run("worker", "--reload", "--burst")

    assert done.returncode == 2
