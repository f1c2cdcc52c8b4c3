"""A fault of the table in docs/reliability.md: a signal that the main thread does not feel."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import signal, sys, threading
from flask_natspubsub.worker.processes.signals import SignalledProcess

class Signalled(SignalledProcess):
    def work(self):
        main = threading.main_thread().ident
        while sys._current_frames()[main].f_code.co_name != "_next_news":
            self._stop.wait(0.01)
        self._stop.wait(0.1)  # by now it waits
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        return self._stop.wait(20)

sys.exit(Signalled(lambda timeout: None).run())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to threads there")
def test_a_signal_that_the_system_gives_to_another_thread_is_obeyed() -> None:
    """As it does with the second of two that come at once."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
