"""A child process and its lifeline: a socket to the parent that breaks when either of them dies.

Signals alone are not enough. A parent that is killed sends none; and a service manager sends its
own SIGTERM to each process of a group, so that a child would get two and take the second for
"at once". Over the lifeline, the parent says which end it means.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from ...text import get_logger
from .vitals import Vitals

_log = get_logger("flask_natspubsub.worker")

_MARKER = "_NATSPUBSUB_WORKER_CHILD"
_STOP, _AT_ONCE = b"s", b"!"
#: Seconds that the end of a child may take beyond NATSPUBSUB_SHUTDOWN_TIMEOUT.
GRACE = 10.0

#: Whether a child can inherit a socket; on Windows it cannot.
AVAILABLE = os.name == "posix"


class Lifeline:
    """The child's end of the socket to its parent."""

    def __init__(self, end: socket.socket | None) -> None:
        self._end = end

    def listen(self, stop: Callable[[bool], None], patience: float) -> None:
        """Call ``stop(at_once)`` when the parent asks for it or is gone, from a thread.

        :param patience: seconds that the process may take to end when the parent is gone.
        """
        if self._end is not None:
            threading.Thread(
                target=self._listen,
                args=(self._end, stop, patience),
                name="natspubsub-lifeline",
                daemon=True,
            ).start()

    def _listen(self, end: socket.socket, stop: Callable[[bool], None], patience: float) -> None:
        while word := _received(end):
            stop(_AT_ONCE in word)
        _log.warning("the parent process is gone: ending too")
        stop(False)
        time.sleep(patience)
        _log.error("still not ended after %g s: ending at once", patience)
        os._exit(1)

    def tell(self, vitals: Vitals) -> None:
        """Send a heartbeat.

        :raises OSError: the parent is gone.
        """
        if self._end is not None:
            self._end.sendall(msgspec.json.encode(vitals) + b"\n")


def adopted() -> Lifeline | None:
    """Return this process's lifeline at the first call; None if it is no parent's child.

    The environment variable is removed: a process that a handler starts is no child of the parent.
    """
    marker = os.environ.pop(_MARKER, None)
    if marker is None:
        return None
    if not marker.isdecimal():
        return Lifeline(None)
    os.set_inheritable(int(marker), False)
    return Lifeline(socket.socket(fileno=int(marker)))


class Child:
    """A worker process, as its parent sees it.

    It runs the parent's own command instead of being forked, so that it inherits no lock that a
    thread held and no connection that both would write to.

    :param command: starts the process.
    :raises OSError: it cannot be started.
    """

    def __init__(self, command: Sequence[str]) -> None:
        #: The last heartbeat; None before the first.
        self.vitals: Vitals | None = None
        #: When it was started, and when last heard of, on the monotonic clock.
        self.started = self.heard = time.monotonic()
        self._buffer = b""
        self._end: socket.socket | None = None
        if AVAILABLE:
            self._end, other = socket.socketpair()
            with other:
                os.set_inheritable(other.fileno(), True)
                self._end.setblocking(False)
                try:
                    self._process = _start(command, str(other.fileno()), [other.fileno()])
                except OSError:
                    self._end.close()
                    raise
        else:
            self._process = _start(command, "none", [])

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def ask_to_end(self, *, at_once: bool = False) -> None:
        """Ask it to stop, gracefully or at once. Idempotent."""
        if self._end is None:
            self._process.terminate()
            return
        with contextlib.suppress(OSError):  # it is dead, or hangs and will be killed
            self._end.send(_AT_ONCE if at_once else _STOP)
        self.listen()
        if self.vitals is None:  # it loads the application: does not listen, has nothing in hand
            self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def listen(self) -> None:
        """Read the heartbeats received since the last call; does not wait."""
        data = b""
        while self._end is not None and (more := _received(self._end)):
            data += more
        if not data:
            return
        self.heard = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if lines:
            self.vitals = msgspec.json.decode(lines[-1], type=Vitals)

    def close(self) -> None:
        """Close the socket; a child that still runs takes this for the end of its parent."""
        if self._end is not None:
            self._end.close()


def own_command() -> list[str]:
    """Return the command this process was started with; also right for ``python -m flask``."""
    return [sys.executable, *sys.orig_argv[1:]]


def _start(
    command: Sequence[str], marker: str, descriptors: Sequence[int]
) -> subprocess.Popen[bytes]:
    # In a session of its own: Ctrl-C reaches the parent only, which passes it on once.
    return subprocess.Popen(  # noqa: S603 - the command this process was started with
        command,
        env={**os.environ, _MARKER: marker},
        pass_fds=descriptors,
        start_new_session=True,
    )


def _received(end: socket.socket) -> bytes:
    """Return what was received; nothing if the other end is closed or a read would block."""
    try:
        return end.recv(65536)
    except OSError:
        return b""


def exit_text(code: int) -> str:
    """Describe how a process ended, by its exit code."""
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
