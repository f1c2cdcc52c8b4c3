"""What ties a child process to its parent: a socket that breaks when either of them dies.

Signals alone would not do. A parent that is killed sends none; and a service manager sends its
own SIGTERM to each process of a group, so that a child would get two and take the second for
"at once". Over the lifeline, the parent says which of the two it means.
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
#: What a child may take to end beyond NATSPUBSUB_SHUTDOWN_TIMEOUT; seconds.
GRACE = 10.0

#: Whether a socket can be handed to a child here; Windows starts processes in another way.
AVAILABLE = os.name == "posix"


class Lifeline:
    """A child's end."""

    def __init__(self, end: socket.socket | None) -> None:
        self._end = end

    def listen(self, stop: Callable[[bool], None], patience: float) -> None:
        """Call ``stop`` when the parent says so, or is gone; with True for "at once".

        :param patience: how long the process may take to end when the parent is gone; seconds.
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
        """Send a heartbeat; OSError if the parent is gone."""
        if self._end is not None:
            self._end.sendall(msgspec.json.encode(vitals) + b"\n")


def adopted() -> Lifeline | None:
    """Return this process's lifeline, at the first call; None if no parent started it so.

    The variable that tells is removed: what a handler starts is not the parent's child.
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

    It runs the parent's own command anew rather than being forked, so that it has nothing of
    the parent's: no lock that a thread held, no connection that both would write to.
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
        """Have it end in order, or at once; to ask twice is to ask once."""
        if self._end is None:
            self._process.terminate()
            return
        with contextlib.suppress(OSError):  # it is dead, or hangs and will be killed
            self._end.send(_AT_ONCE if at_once else _STOP)
        self.listen()
        if self.vitals is None:  # it loads the application: does not listen, has nothing in hand
            self._process.terminate()

    def kill(self) -> None:
        """End it as nothing can refuse."""
        self._process.kill()

    def listen(self) -> None:
        """Take in the heartbeats that have come."""
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
        """Let go of it; one that still runs takes this for the parent's end."""
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
    """Return what has come; nothing if the other is gone, or nothing has come and none waits."""
    try:
        return end.recv(65536)
    except OSError:
        return b""


def exit_text(code: int) -> str:
    """Say how a process ended."""
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
