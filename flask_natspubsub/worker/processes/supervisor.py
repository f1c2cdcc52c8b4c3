"""The supervisor: several worker processes under one parent, which replaces those that fail.

The parent has no connection, runs no subscriber, and has no threads but those of the health
endpoint. Each process runs the parent's own command: a fork would inherit what the application's
modules have opened and started, such as a database pool, a client's threads, a random state. The
price is memory, which forked processes would share in part.
"""

from __future__ import annotations

import os
import queue
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ...text import get_logger
from .child import GRACE, Child, exit_text
from .signals import caught_signals

_log = get_logger("flask_natspubsub.worker")

#: Seconds between two looks at the processes.
TICK = 0.1
#: ``DEATHS`` of one process within ``WINDOW`` seconds end all, with exit code 1.
DEATHS = 5
WINDOW = 60.0
#: Seconds until a process that died is replaced, doubled with each death in the window.
BACKOFF = 0.2
#: Seconds that a process may take to load the application, until its first heartbeat.
START_TIMEOUT = 120.0
#: Seconds that a restart waits for a process to be well before it goes on to the next.
UP_TIMEOUT = 10.0
#: Seconds of silence that every process is allowed, whatever the setting.
LEAST_SILENCE = 3.0
#: Seconds that processes may take to end at once.
URGENT = 5.0
#: Seconds that the parent itself must have stood still not to take its children for silent.
HELD_UP = 5.0

_MISUSED = 2


class Slot:
    """A slot for one child process, with the history of its predecessors."""

    def __init__(self, number: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.number = number
        self.child: Child | None = None
        #: When the child, which was asked to end, is killed; None if it was not asked.
        self.deadline: float | None = None
        #: When the next child is started.
        self.due = 0.0
        #: Whether nothing is left to do here.
        self.done = False
        self.restarts = 0
        self._clock = clock
        self._deaths: deque[float] = deque(maxlen=DEATHS)

    def ask_to_end(self, patience: float, *, at_once: bool = False) -> None:
        """Ask the child to end; it is killed after ``patience`` seconds."""
        if self.child is not None:
            self.child.ask_to_end(at_once=at_once)
            self.deadline = self._clock() + patience

    def died(self) -> float | None:
        """Count a death; returns the seconds until the next start, None after too many."""
        now = self._clock()
        self._deaths.append(now)
        recent = [when for when in self._deaths if now - when < WINDOW]
        if len(recent) == DEATHS:
            return None
        return float(BACKOFF * 2 ** (len(recent) - 1))

    def complaint(self, limit: float) -> str:
        """Return why the child must be killed; empty if it lives."""
        child = self.child
        if child is None:
            return ""
        silent = self._clock() - child.heard
        if silent > (limit if child.vitals else max(limit, START_TIMEOUT)):
            return f"no sign of life for {silent:.0f} s"
        stalled = child.vitals.stalled(limit) if child.vitals else []
        return f"does not go round: {', '.join(stalled)}" if stalled else ""


class Supervisor:
    """Keeps a number of worker processes running.

    :param command: starts one.
    :param processes: how many.
    :param patience: seconds that the graceful end of one may take.
    :param silence: seconds without a heartbeat after which one is killed and replaced. One whose
        handler runs on for longer than this after its time limit is replaced gracefully.
    :param burst: end when each process has ended with 0.
    :param start: starts a child process.
    :param clock: the monotonic clock.
    """

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        patience: float,
        silence: float,
        *,
        burst: bool = False,
        start: Callable[[Sequence[str]], Child] = Child,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        #: The exit code; None before the end has begun.
        self.exit_code: int | None = None
        self._command = command
        self._start = start
        self._clock = clock
        self._slots = [Slot(number, clock) for number in range(1, processes + 1)]
        self._patience = patience + GRACE
        self._silence = max(silence, LEAST_SILENCE)
        self._burst = burst
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._restarting: deque[Slot] = deque()
        self._beat = clock()

    def run(self) -> int:
        """Run until a signal, the end of a burst, or a crash loop; returns the exit code.

        Call it in the main thread.
        """
        with caught_signals(self._signals.put):
            try:
                while self.exit_code is None or any(slot.child for slot in self._slots):
                    self.turn(self._signal_within(TICK))
            finally:
                for slot in self._slots:
                    if slot.child is not None:
                        slot.child.close()
        _log.info("stopped")
        return self.exit_code

    def health(self) -> tuple[bool, dict[str, dict[str, Any]]]:
        """Return whether the parent lives, and a row for each process; any thread."""
        live = self._clock() - self._beat < HELD_UP * 2
        return live, {f"process {slot.number}": self._row(slot) for slot in self._slots}

    def _row(self, slot: Slot) -> dict[str, Any]:
        child = slot.child
        vitals = child.vitals if child else None
        if slot.done:
            return {"status": "ok", "restarts": slot.restarts}
        if child is None or vitals is None:
            return {"status": "failed", "failed": ["started"], "restarts": slot.restarts}
        failed = vitals.failed + vitals.stalled(self._silence)
        if self._clock() - child.heard > self._silence:
            failed.append("heartbeat")
        return {
            "status": "failed" if failed else "ok",
            "failed": failed,
            "pid": child.pid,
            "restarts": slot.restarts,
            "loops": vitals.loops,
            **vitals.load,
        }

    # --- round and round

    def turn(self, signal_number: int | None = None) -> None:
        """Do one round: obey a signal, start what is due, look after each process."""
        if signal_number is not None:
            self._on_signal(signal_number)
        now = self._clock()
        held_up = now - self._beat > HELD_UP
        self._beat = now
        for slot in self._slots:
            if slot.child is None:
                self._start_if_due(slot)
            else:
                if held_up:
                    slot.child.heard = now
                self._look_after(slot, slot.child)
        if self._restarting and all(self._is_up(slot) for slot in self._slots):
            self._restarting.popleft().ask_to_end(self._patience)

    def _signal_within(self, seconds: float) -> int | None:
        try:
            return self._signals.get(timeout=seconds)
        except queue.Empty:
            return None

    def _is_up(self, slot: Slot) -> bool:
        """Whether others may be restarted: it is well, or has had ``UP_TIMEOUT`` to get well."""
        child = slot.child
        if child is None or child.vitals is None or slot.deadline is not None:
            return slot.done
        return not child.vitals.failed or self._clock() - child.started > UP_TIMEOUT

    def _start_if_due(self, slot: Slot) -> None:
        if self.exit_code is not None or slot.done or self._clock() < slot.due:
            return
        try:
            slot.child = self._start(self._command)
        except OSError as error:
            self._replace(slot, f"cannot be started: {error}")

    def _look_after(self, slot: Slot, child: Child) -> None:
        child.listen()
        code = child.poll()
        if code is not None:
            self._on_end(slot, child, code)
        elif slot.deadline is not None:
            if self._clock() > slot.deadline:
                _log.error("process %d does not end in time: killing it", slot.number)
                child.kill()
        elif complaint := slot.complaint(self._silence):
            _log.error("process %d (%d): %s: killing it", slot.number, child.pid, complaint)
            child.kill()
        elif child.vitals is not None and child.vitals.overdue > self._silence:
            _log.warning(
                "process %d (%d): a handler has run %g s beyond its time limit: replacing it",
                slot.number, child.pid, child.vitals.overdue,
            )  # fmt: skip
            slot.ask_to_end(self._patience)

    # --- ends

    def _on_end(self, slot: Slot, child: Child, code: int) -> None:
        asked, was_up = slot.deadline is not None, child.vitals is not None
        child.close()
        slot.child = slot.deadline = None
        if self.exit_code is not None:
            if was_up and code not in (0, -signal.SIGTERM):
                self.exit_code = self.exit_code or 1
                _log.warning("process %d %s", slot.number, exit_text(code))
        elif asked:
            slot.restarts += 1
        elif code == 0 and self._burst:
            slot.done = True
            if all(one.done for one in self._slots):
                self.end(0)
        elif code == _MISUSED:
            self.end(_MISUSED)
        else:
            self._replace(slot, f"({child.pid}) {exit_text(code)}")

    def _replace(self, slot: Slot, why: str) -> None:
        wait = slot.died()
        if wait is None:
            _log.error(
                "process %d %s: %d times within %g s; ending with 1. What it logged before says "
                "why",
                slot.number, why, DEATHS, WINDOW,
            )  # fmt: skip
            self.end(1)
            return
        _log.error("process %d %s; another is started in %g s", slot.number, why, wait)
        slot.restarts += 1
        slot.due = self._clock() + wait

    def end(self, code: int) -> None:
        """Ask all processes to end gracefully, and then end with ``code``."""
        self.exit_code = code
        self._restarting.clear()
        for slot in self._slots:
            slot.ask_to_end(self._patience)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.exit_code is not None:
            _log.warning("%s again: ending at once", name)
            for slot in self._slots:
                slot.ask_to_end(URGENT, at_once=True)
        elif name == "SIGHUP" and not os.isatty(0):
            _log.info("SIGHUP: restarting the processes, one after the other")
            self._restarting = deque(slot for slot in self._slots if not slot.done)
        else:
            _log.info("%s: ending in order; once more ends at once", name)
            self.end(0)
