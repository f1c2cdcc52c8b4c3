"""The reloader: runs the worker as a child process and restarts it when its code changes."""

from __future__ import annotations

import os
import queue
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...text import get_logger
from .child import GRACE, Child, exit_text
from .signals import caught_signals

_log = get_logger("flask_natspubsub.worker")

#: Seconds between two looks at the files.
INTERVAL = 0.5
_SKIPPED = {"__pycache__", "node_modules", "site-packages"}


class Reloader:
    """Keeps a child process running the current code.

    A child that fails is not started again before a file changes: the code has to be mended.

    :param command: starts the child.
    :param folders: ``*.py`` below them is watched, and so are the modules loaded here that are
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
                child = Child(self._command)
                number = self._wait_for_change(child, files)
                if number is None and child.poll() == 0:
                    return 0
                code = self._end(child)
                if number is not None:
                    return code if code >= 0 else 128 - code

    def _wait_for_change(self, child: Child, files: dict[str, int]) -> int | None:
        """Return the signal that came; None when a file changed or the child ended well."""
        failed = False
        while True:
            number = self._signal_within(INTERVAL)
            child.listen()
            code = child.poll()
            if number is not None or code == 0:
                return number
            if code is not None and not failed:
                failed = True
                _log.error("the worker %s; waiting for a change", exit_text(code))
            now = watched_files(self._folders)
            if now != files:
                changed = sorted(path for path, _ in now.items() ^ files.items())
                _log.info("%s changed: starting anew", changed[0])
                return None

    def _end(self, child: Child) -> int:
        """Stop the child, at once if another signal comes; returns its exit code."""
        waited = 0.0
        child.ask_to_end()
        while (code := child.poll()) is None:
            if waited > self._patience:
                child.kill()
            if self._signal_within(0.05) is not None:
                child.ask_to_end(at_once=True)
            waited += 0.05
        child.close()
        return code

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
    """Whether a folder is not the project's own, such as a virtual environment."""
    hidden = folder.name.startswith(".") or folder.name in _SKIPPED
    return hidden or (folder / "pyvenv.cfg").exists()
