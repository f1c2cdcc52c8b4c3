"""The log of a command on stderr. The lines of messages that went well are written together.

A write for each would cost more than many a message: each gives the interpreter away to
another thread. So those lines are kept until there is an occasion, formatted then, and written
in one go. What is kept is written

* ``HOLD`` seconds later at the latest, by a thread that sleeps while there is nothing;
* before the acknowledgements of these messages leave the process (``flush_before``): what the
  server will not deliver again is in the log, even if a handler kills the process;
* before any other line, which is written at once by whoever logs it; and at the end.
"""

from __future__ import annotations

import logging
import os
import select
import stat
import sys
import threading
import time
import weakref
from collections import deque
from typing import TextIO

import click

from ..worker.outcome import OutcomeRecord
from .output import is_terminal

#: How long a line may be kept; seconds.
HOLD = 0.05
#: So many lines are kept at most; then whoever logs waits until they are written.
MOST = 10_000
#: So long does the broker's thread wait for a write of another thread; seconds.
PATIENCE = 0.1
#: So many characters are written at once to a file, or to what others write to as well: up to
#: so many bytes a pipe keeps together.
TOGETHER, PIPE = 65_536, 4096

_LEVEL_COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


def log_to_stderr(level: int, *, with_pid: bool = False) -> LineWriter | None:
    """Show the logs of this package, unless the application has configured logging itself.

    :param with_pid: with the process id, where several processes write to one stderr.
    :returns: what writes them, or None.
    """
    logger = logging.getLogger("flask_natspubsub")
    if logger.hasHandlers():
        return None
    writer = LineWriter(sys.stderr, with_pid=with_pid)
    logger.addHandler(writer)
    if logger.level == logging.NOTSET:
        logger.setLevel(level)
    return writer


class LineWriter(logging.Handler):
    """Writes records to ``stream``; see above."""

    def __init__(self, stream: TextIO, *, with_pid: bool = False) -> None:
        super().__init__()
        pid = "[%(process)d] " if with_pid else ""
        self.setFormatter(_LineFormatter(f"%(asctime)s %(levelname)-7s {pid}%(message)s"))
        self._with_pid = with_pid
        self._stream = stream
        self._room = _room_of(stream)
        self._kept: deque[OutcomeRecord | str] = deque()
        #: The beginning of the lines of one millisecond.
        self._millis, self._head = 0, ""
        self._start_anew()
        _writers.add(self)

    def _start_anew(self) -> None:
        """Keep nothing and have no thread: what a fork finds here is its parent's to write."""
        self._kept.clear()
        self._pid = f"[{os.getpid()}] " if self._with_pid else ""
        # Whoever writes may be interrupted, by a finalizer that logs: that must not wait for it.
        self._writing = threading.RLock()
        self._is_writing = False
        self._wake = threading.Event()
        self._is_awake = False
        self._is_open = True
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    # --- whoever logs

    def handle(self, record: logging.LogRecord) -> bool:
        """Take a record; without a lock, for which the threads would wait for each other."""
        if self.filter(record):
            self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line of a message that went well; write any other."""
        late = record if isinstance(record, OutcomeRecord) and not self.filters else None
        if late is not None and len(self._kept) < MOST and self._is_open:
            self._kept.append(late)
            if not self._is_awake:
                self._is_awake = True
                self._wake_writer()
            return
        try:
            self._kept.append(self.format(record) if late is None else late)
            self.flush()
        except Exception:  # noqa: BLE001 - logging has a way to tell, or not to
            self.handleError(record)

    def _wake_writer(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_on, name="log", daemon=True)
            self._thread.start()
        self._wake.set()

    def flush(self) -> None:
        """Write what is kept, however long it takes."""
        with self._writing:
            self._write()

    def flush_before(self) -> None:
        """Write what is kept, unless nobody takes it: the broker's thread must not wait long."""
        if not (self._kept or self._is_writing):
            return
        if self._writing.acquire(timeout=PATIENCE):
            try:
                while self._kept and _takes(self._stream, self._room):
                    self._write_some()
            except (OSError, ValueError):
                self._kept.clear()
            finally:
                self._writing.release()

    def close(self) -> None:
        """End the thread; what comes later is written when it is flushed."""
        self._is_open = False
        self._ended.set()
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(HOLD)
        super().close()

    # --- writing

    def _write_on(self) -> None:
        wake, ended = self._wake, self._ended
        while True:
            wake.wait()
            if ended.wait(HOLD):
                return
            wake.clear()
            self._is_awake = False  # before the look: a line that is kept after it wakes again
            try:
                self.flush()
            except (OSError, ValueError):
                self._kept.clear()  # the stream is closed, or its disk full

    def _write(self) -> None:
        while self._kept:
            self._write_some()

    def _write_some(self) -> None:
        """Write as many lines as go together; at least one."""
        self._is_writing = True
        try:
            lines = self._take_some()
            self._stream.write("\n".join(lines) + "\n")
            self._stream.flush()
        finally:
            self._is_writing = False

    def _take_some(self) -> list[str]:
        lines: list[str] = []
        size = 0
        while self._kept:
            first = self._kept[0]
            line = self._line(first) if isinstance(first, OutcomeRecord) else first
            size += len(line) + 1
            if lines and size > self._room:
                break
            lines.append(line)
            self._kept.popleft()
        return lines

    def _line(self, record: OutcomeRecord) -> str:
        """Format the record of a message that went well: as the formatter does, and faster."""
        millis = int(record.created * 1000)
        if millis != self._millis:
            self._millis = millis
            stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(millis // 1000))
            self._head = f"{stamp}.{millis % 1000:03d} INFO    {self._pid}"
        return self._head + record.line()


class _LineFormatter(logging.Formatter):
    default_msec_format = "%s.%03d"

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        colour = _LEVEL_COLOURS.get(record.levelname)
        return click.style(line, fg=colour) if colour and is_terminal(sys.stderr) else line


def _room_of(stream: TextIO) -> int:
    """Return how many characters are written at once."""
    try:
        is_file = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # it is no file at all
        return TOGETHER
    return TOGETHER if is_file else PIPE


def _takes(stream: TextIO, room: int) -> bool:
    """Whether a write would not wait; a file's never does."""
    if room == TOGETHER or not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return bool(poll.poll(0))


_writers: weakref.WeakSet[LineWriter] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for writer in list(_writers):
        writer._start_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
