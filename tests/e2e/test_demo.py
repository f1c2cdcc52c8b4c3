"""The demonstration, as ``make demo`` runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import eventually

pytestmark = pytest.mark.real_server

ROOT = Path(__file__).parents[2]


class Demo:
    """The demonstration as a process, with its temporary files in ``folder / "files"``."""

    def __init__(self, folder, *arguments, **environment):
        self.files = folder / "files"
        self.files.mkdir()
        self._output = folder / "output"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "example_app.demo", *arguments],
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(self.files), **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    @property
    def output(self):
        return self._output.read_text()

    def await_end(self):
        """Return the exit code."""
        return self.process.wait(100)

    def leftovers(self):
        """Return its remaining files, and processes that have its folder in their environment."""
        left = list(self.files.iterdir())
        for process in Path("/proc").glob("[0-9]*"):
            try:
                known = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            except OSError:  # it has just ended, or is somebody else's
                continue
            if str(self.files).encode() in known:
                left.append(process)
        return left


def test_the_demonstration_sees_every_step_and_leaves_nothing(tmp_path):
    with Demo(tmp_path, "--once") as demo:
        assert demo.await_end() == 0, demo.output

    for step in (
        "12 of 12 accepted",
        "order.created",
        "Teapot 988 -> 986",
        "order.confirmed",
        "order.rejected",
        "flask natspubsub dlq list",
        "nobody knows which warehouse has 'Samovar'",
        "flask natspubsub dlq replay",
        "2 events wait in the database",
        "All 25 steps were seen.",
    ):
        assert step in demo.output
    assert demo.leftovers() == []


def test_the_demonstration_says_what_it_has_not_seen(tmp_path):
    nobody_listens = {"FLASK_NATSPUBSUB_SUBSCRIBERS": "[]", "STEP_TIMEOUT": "2"}
    with Demo(tmp_path, "--once", **nobody_listens) as demo:
        assert demo.await_end() == 1, demo.output

    assert "Not seen: order " in demo.output
    assert "--- worker.log" in demo.output
    assert demo.leftovers() == []


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("gunicorn ", signal.SIGTERM),
        pytest.param("stays up until", signal.SIGINT, marks=pytest.mark.long),
    ],
)
def test_a_signal_ends_the_demonstration_and_all_it_started(tmp_path, moment, number):
    with Demo(tmp_path) as demo:
        eventually(lambda: moment in demo.output, 60, f"never said: {moment}")
        assert demo.leftovers()
        demo.process.send_signal(number)
        assert demo.await_end() == 0, demo.output

    assert "Stopping." in demo.output
    assert demo.leftovers() == []
