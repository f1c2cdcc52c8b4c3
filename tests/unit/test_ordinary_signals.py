"""The tests' own children are ended by signals, whoever started the tests."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHILD = "import signal; print(signal.getsignal(signal.{0}) is signal.SIG_IGN)"
PARENT = """
import signal, subprocess, sys
signal.signal(signal.{0}, signal.SIG_IGN)
from tests.support import ordinary_signals
if {1}:
    ordinary_signals.restore()
subprocess.run([sys.executable, "-c", {2!r}], check=True)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGTERM"])
@pytest.mark.parametrize("restored", [True, False])
def test_a_child_does_not_inherit_that_a_signal_is_ignored(name: str, restored: bool) -> None:
    if not hasattr(signal, name):
        pytest.skip("there is no such signal here")
    code = PARENT.format(name, restored, CHILD.format(name))

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == str(not restored)
