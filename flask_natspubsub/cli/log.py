"""The log of a command on stderr. The lines of successful messages are written in batches.

A write for each line would cost more than handling many a message: each write releases the
interpreter to another thread. So these lines are buffered and formatted later. The buffer is
written

* after ``HOLD`` seconds at the latest, by a thread that sleeps while the buffer is empty;
* before the acknowledgements of these messages leave the process (``flush_before``): a message
  that the server will not deliver again is in the log, even if a handler kills the process;
* before any other line, which the logging thread writes at once; and at the end.
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

#: Limit of the time that a line is buffered, in seconds.
HOLD = 0.05
#: Limit of buffered lines; beyond it, the logging thread writes them itself.
BUFFER_LIMIT = 10_000
#: Seconds that the broker's thread waits for a write of another thread.
WRITE_TIMEOUT = 0.1
#: Limits of one write, in characters: to a file, and to a pipe, where larger ones may be mixed
#: with those of other processes.
FILE_CHUNK, PIPE_CHUNK = 65_536, 4096

_LEVEL_COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


def log_to_stderr(level: int, *, with_pid: bool = False) -> LineWriter | None:
    """Show the logs of this package, unless the application has configured logging itself.

    :param with_pid: add the process id, where several processes write to one stderr.
    :returns: the handler that writes them; None if the application has configured logging.
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
    """Writes records to ``stream``, those of successful messages in batches."""

    def __init__(self, stream: TextIO, *, with_pid: bool = False) -> None:
        super().__init__()
        pid = "[%(process)d] " if with_pid else ""
        self.setFormatter(_LineFormatter(f"%(asctime)s %(levelname)-7s {pid}%(message)s"))
        self._with_pid = with_pid
        self._stream = stream
        self._room = _room_of(stream)
        self._kept: deque[OutcomeRecord | str] = deque()
        #: Cached start of the lines of one millisecond.
        self._millis, self._head = 0, ""
        self._start_anew()
        _writers.add(self)

    def _start_anew(self) -> None:
        """Empty the buffer and forget the thread: after a fork, both are the parent's."""
        self._kept.clear()
        self._pid = f"[{os.getpid()}] " if self._with_pid else ""
        # Reentrant: a finalizer that logs may interrupt the thread that is writing.
        self._writing = threading.RLock()
        self._is_writing = False
        self._wake = threading.Event()
        self._is_awake = False
        self._is_open = True
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    # --- logging

    def handle(self, record: logging.LogRecord) -> bool:
        """Take a record, without the lock of ``Handler.handle``: threads would wait for it."""
        if self.filter(record):
            self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Buffer the record of a successful message; write any other at once."""
        late = record if isinstance(record, OutcomeRecord) and not self.filters else None
        if late is not None and len(self._kept) < BUFFER_LIMIT and self._is_open:
            self._kept.append(late)
            if not self._is_awake:
                self._is_awake = True
                self._wake_writer()
            return
        try:
            self._kept.append(self.format(record) if late is None else late)
            self.flush()
        except Exception:  # noqa: BLE001 - logging has its own way to report it
            self.handleError(record)

    def _wake_writer(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_on, name="log", daemon=True)
            self._thread.start()
        self._wake.set()

    def flush(self) -> None:
        """Write the buffer, however long it takes."""
        with self._writing:
            self._write()

    def flush_before(self) -> None:
        """Write the buffer unless the reader is blocked: the broker's thread must not wait long."""
        if not (self._kept or self._is_writing):
            return
        if self._writing.acquire(timeout=WRITE_TIMEOUT):
            try:
                while self._kept and _takes(self._stream, self._room):
                    self._write_some()
            except (OSError, ValueError):
                self._kept.clear()
            finally:
                self._writing.release()

    def close(self) -> None:
        """Stop the thread; records that come later are written when they are flushed."""
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
            self._is_awake = False  # before the flush: a line added after it wakes the thread
            try:
                self.flush()
            except (OSError, ValueError):
                self._kept.clear()  # the stream is closed, or its disk is full

    def _write(self) -> None:
        while self._kept:
            self._write_some()

    def _write_some(self) -> None:
        """Write the lines of one chunk, at least one."""
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
        """Format the record of a successful message, as the formatter does but faster."""
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
    """Return the limit of one write in characters."""
    try:
        is_file = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # not a real file
        return FILE_CHUNK
    return FILE_CHUNK if is_file else PIPE_CHUNK


def _takes(stream: TextIO, room: int) -> bool:
    """Whether a write would not block; writes to a file never do."""
    if room == FILE_CHUNK or not hasattr(select, "poll"):
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
