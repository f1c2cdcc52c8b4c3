"""``make demo``, without make."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from example_app.demo.processes import free_port, is_listening, wait_for

pytestmark = pytest.mark.real_server

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "example_app.demo"]


def start(*arguments, **environment):
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def processes_in(folder):
    """The processes that have something in ``folder`` on their command line or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            seen = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in seen and process.name != str(os.getpid()):
            found.append(process.name)
    return found


def test_the_demonstration_sees_every_step_and_leaves_nothing(tmp_path):
    demo = start("--once", TMPDIR=str(tmp_path))
    try:
        output, _ = demo.communicate(timeout=100)
    finally:
        demo.kill()

    assert demo.returncode == 0, output
    for step in (
        "12 of 12 accepted",
        "order.created",
        "Teapot 988 -> 986",
        "order.confirmed",
        "order.rejected",
        "flask natspubsub dlq list",
        "flask natspubsub dlq replay",
        "steps were seen.",
    ):
        assert step in output
    assert list(tmp_path.iterdir()) == []
    assert processes_in(tmp_path) == []


def test_the_demonstration_says_what_it_has_not_seen(tmp_path):
    with_nobody_listening = {"FLASK_NATSPUBSUB_SUBSCRIBERS": "[]", "TMPDIR": str(tmp_path)}
    demo = start("--once", STEP_TIMEOUT="2", **with_nobody_listening)
    try:
        output, _ = demo.communicate(timeout=100)
    finally:
        demo.kill()

    assert demo.returncode == 1, output
    assert "Not seen: order " in output
    assert "--- worker.log" in output
    assert processes_in(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demonstration_and_all_it_started(tmp_path, number):
    http_port = free_port()
    demo = start(HTTP_PORT=str(http_port), TMPDIR=str(tmp_path))
    try:
        wait_for(lambda: is_listening(http_port), "the shop", within=30)
        demo.send_signal(number)
        output, _ = demo.communicate(timeout=60)
    finally:
        demo.kill()

    assert demo.returncode == 0, output
    assert "Stopping." in output
    assert list(tmp_path.iterdir()) == []
    assert processes_in(tmp_path) == []
