"""Runs the worker as a child process and starts it anew when its code changes."""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from .process import caught_signals

_log = logging.getLogger("flask_natspubsub.worker")

INTERVAL = 0.5
#: What a child may take to end beyond its own limit; seconds.
GRACE = 10.0
_MARKER = "_NATSPUBSUB_WORKER_CHILD"
_SKIPPED = {"__pycache__", "node_modules", "site-packages"}


def in_child() -> bool:
    """Whether this process was started by a ``Reloader``."""
    return _MARKER in os.environ


class Reloader:
    """Keeps a child process running the code as it is now.

    A child that fails is not started again before a file changes: the code has to be mended.

    :param command: starts the child.
    :param folders: ``*.py`` below them is watched, beside the modules loaded here that are
        not installed ones.
    :param patience: seconds a child may take to end.
    """

    def __init__(self, command: Sequence[str], folders: Sequence[str], patience: float) -> None:
        self._command = command
        self._folders = folders
        self._patience = patience + GRACE
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()

    def run(self) -> int:
        """Run until a signal, or until the child ends well; returns the child's exit code."""
        with caught_signals(self._signals.put):
            while True:
                files = watched_files(self._folders)
                child = self._start()
                number = self._wait_for_change(child, files)
                if number is None and child.poll() == 0:
                    return 0
                code = self._end(child, number or signal.SIGTERM)
                if number is not None:
                    return code if code >= 0 else 128 - code

    def _start(self) -> subprocess.Popen[bytes]:
        # In a session of its own: Ctrl-C reaches the parent only, which passes it on once.
        return subprocess.Popen(  # noqa: S603 - the command this process was started with
            self._command, env={**os.environ, _MARKER: "1"}, start_new_session=True
        )

    def _wait_for_change(self, child: subprocess.Popen[bytes], files: dict[str, int]) -> int | None:
        """Return the signal that came; None when a file changed or the child ended well."""
        failed = False
        while True:
            number = self._signal_within(INTERVAL)
            if number is not None or child.poll() == 0:
                return number
            if child.returncode is not None and not failed:
                failed = True
                _log.error("the worker ended with %d; waiting for a change", child.returncode)
            now = watched_files(self._folders)
            if now != files:
                changed = sorted(path for path, _ in now.items() ^ files.items())
                _log.info("%s changed: starting anew", changed[0])
                return None

    def _end(self, child: subprocess.Popen[bytes], number: int) -> int:
        """Pass a signal on, and any further one, until the child has ended."""
        waited = 0.0
        pending: int | None = number
        while child.poll() is None:
            if pending is not None:
                child.send_signal(pending)
            elif waited > self._patience:
                child.kill()
            pending = self._signal_within(0.05)
            waited += 0.05
        return child.returncode

    def _signal_within(self, seconds: float) -> int | None:
        try:
            return self._signals.get(timeout=seconds)
        except queue.Empty:
            return None


def watched_files(folders: Sequence[str]) -> dict[str, int]:
    """Return the project's Python files with the time of their last change."""
    times = {}
    for path in {*_loaded_files(), *_files_below(folders)}:
        try:
            times[path] = Path(path).stat().st_mtime_ns
        except OSError:
            continue
    return times


def _loaded_files() -> Iterator[str]:
    installed = tuple(
        sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    )
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if path and path.endswith(".py") and not path.startswith(installed):
            yield path


def _files_below(folders: Sequence[str]) -> Iterator[str]:
    for top in folders:
        for folder, inner, names in os.walk(top):
            inner[:] = [name for name in inner if not _is_foreign(Path(folder, name))]
            yield from (str(Path(folder, name)) for name in names if name.endswith(".py"))


def _is_foreign(folder: Path) -> bool:
    """Whether a folder is none of the project's own, such as a virtual environment."""
    hidden = folder.name.startswith(".") or folder.name in _SKIPPED
    return hidden or (folder / "pyvenv.cfg").exists()
