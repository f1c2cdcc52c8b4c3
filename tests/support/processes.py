"""Child processes of tests: their output goes to a file, and they are stopped at the end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
#: Longer than any command takes, shorter than the default ack_wait of 30 s; seconds.
TIMEOUT = 20.0


class Child:
    """A process in a group of its own; a context manager that ends it.

    :param log: the file that its stdout and stderr are added to.
    :param folder: where it runs.
    :param environment: variables that are added to this process's own.
    :param role: its name in error messages.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        folder: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        role: str = "process",
    ) -> None:
        self.role = role
        self._log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the parent; and a group for ``kill``
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._popen.pid

    @property
    def has_ended(self) -> bool:
        """Whether it has ended."""
        return self._popen.poll() is not None

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self._popen.poll() == -signal.SIGKILL

    @property
    def log(self) -> str:
        """Its output so far."""
        return self._log.read_text("utf-8", errors="replace")

    def wait_for_log(self, pattern: str, count: int = 1, timeout: float = TIMEOUT) -> None:
        """Wait until its output matches a regular expression ``count`` times."""

        def is_there() -> bool:
            return len(re.findall(pattern, self.log)) >= count

        eventually(is_there, timeout, f"the {self.role} did not write {pattern!r}")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._popen.send_signal(number)

    def terminate(self) -> None:
        """Send it SIGTERM, as an operator does."""
        self._popen.terminate()

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait for its end; returns the exit code."""
        return self._popen.wait(timeout)

    def stop(self, timeout: float = TIMEOUT) -> int:
        """Send it SIGTERM and wait for its end; returns the exit code."""
        self.terminate()
        return self.wait(timeout)

    def kill(self) -> None:
        """Send SIGKILL to its process group, and wait for its end."""
        with contextlib.suppress(ProcessLookupError):  # it has already ended
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()

    def end(self, timeout: float = TIMEOUT) -> int:
        """Send it SIGTERM, and kill it if it does not end in time; returns the exit code."""
        self.terminate()
        return self.await_end(timeout)

    def await_end(self, timeout: float = TIMEOUT) -> int:
        """Wait for its end, and kill it after ``timeout`` seconds; returns the exit code."""
        try:
            return self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL


class Children:
    """Processes with a common environment; a context manager that ends them all.

    :param logs: the folder of their logs, one file a role.
    """

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self._logs = logs
        self._environment = environment
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop_all()

    def start(self, role: str, *command: str, **environment: str) -> Child:
        """Start a process; ``environment`` is for this one only."""
        self._children = [child for child in self._children if not child.has_ended]
        variables = {**self._environment, "PGAPPNAME": role, **environment}
        child = Child(command, self._path(role), environment=variables, role=role)
        self._children.append(child)
        return child

    def stop_all(self) -> list[int]:
        """Stop the processes that still run; returns their exit codes."""
        running = [child for child in self._children if not child.has_ended]
        for child in running:
            child.terminate()
        return [child.await_end() for child in running]  # a second SIGTERM would end it at once

    def log(self, role: str, size: int = 3000) -> str:
        """The last ``size`` characters of a role's log."""
        path = self._path(role)
        return path.read_text("utf-8", errors="replace")[-size:] if path.exists() else ""

    def check_killed(self, child: Child) -> None:
        """Check that a child was killed and did not fail by itself."""
        assert child.was_killed, f"the {child.role} failed:\n{self.log(child.role)}"

    def _path(self, role: str) -> Path:
        return self._logs / f"{role}.log"
