"""Child processes that are meant to be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STOP_TIMEOUT = 15.0


class Child:
    """A process and what it is there for."""

    def __init__(self, role: str, popen: subprocess.Popen[bytes]) -> None:
        self.role = role
        self._popen = popen

    @property
    def pid(self) -> int:
        """Process id."""
        return self._popen.pid

    @property
    def has_ended(self) -> bool:
        """Whether it is no longer there."""
        return self._popen.poll() is not None

    @property
    def was_killed(self) -> bool:
        """Whether it ended by SIGKILL, its own or another's."""
        return self._popen.poll() == -signal.SIGKILL

    def kill(self) -> None:
        """End it, and what it has started, as the loss of power would."""
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()

    def terminate(self) -> None:
        """Ask it to end, as an operator does."""
        self._popen.terminate()

    def await_end(self) -> int:
        """Wait for the end that was asked for, or bring it about. Returns the exit code."""
        try:
            return self._popen.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL


class Children:
    """Starts processes with a common environment; a context manager that ends them all.

    :param folder: where their logs are, one file a role.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = environment
        self._children: list[Child] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop_all()

    def stop_all(self) -> list[int]:
        """End those that still run, in order; returns their exit codes."""
        running = [child for child in self._children if not child.has_ended]
        for child in running:
            child.terminate()
        return [child.await_end() for child in running]

    def start(self, role: str, *command: str, **environment: str) -> Child:
        """Start a process; ``environment`` is for this one only."""
        self._children = [child for child in self._children if not child.has_ended]
        with (self._folder / f"{role}.log").open("ab") as log:
            popen = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **self._environment, "PGAPPNAME": role, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the parent; and a group for ``kill``
            )
        child = Child(role, popen)
        self._children.append(child)
        return child

    def log(self, role: str, size: int = 3000) -> str:
        """The end of what the processes of a role have logged."""
        path = self._folder / f"{role}.log"
        return path.read_text(errors="replace")[-size:] if path.exists() else ""

    def check_killed(self, child: Child) -> None:
        """Check that a child that ended was killed, and did not just fail."""
        assert child.was_killed, f"the {child.role} failed:\n{self.log(child.role)}"
