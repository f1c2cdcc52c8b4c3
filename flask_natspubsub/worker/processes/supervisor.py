"""Several worker processes under one parent, which replaces those that die or hang.

The parent has no connection, runs no subscriber, and no thread but those of the health endpoint.
Each process is the parent's own command, run anew: a fork would inherit what the application's
modules have opened and started, such as a database pool, a client's threads, a random state. The
price is memory, which forked processes would share in part.
"""

from __future__ import annotations

import os
import queue
import signal
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from ...text import get_logger
from .child import GRACE, Child, exit_text
from .signals import caught_signals

_log = get_logger("flask_natspubsub.worker")

TICK = 0.1
#: A process that dies this often ...
DEATHS = 5
#: ... within so many seconds ends the whole with exit code 1.
WINDOW = 60.0
#: Wait before a process that died is replaced, doubled with each death in the window; seconds.
BACKOFF = 0.2
#: How long a process may take to load the application, until its first heartbeat; seconds.
START_TIMEOUT = 120.0
#: How long a restart waits for a process to be well before it goes on to the next; seconds.
SETTLE = 10.0
#: A process is not taken for silent sooner, whatever the setting; seconds.
LEAST_SILENCE = 3.0
#: How long processes may take to end at once; seconds.
URGENT = 5.0
#: A parent that was itself held up for so long does not take its children for silent; seconds.
HELD_UP = 5.0

_MISUSED = 2


class Slot:
    """The place of one process: who is there, and how the ones before have fared."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.child: Child | None = None
        #: When the child, which was asked to end, is killed; None if it was not asked.
        self.deadline: float | None = None
        #: When the next child is started.
        self.due = 0.0
        #: Nothing is left to do here.
        self.done = False
        self.restarts = 0
        self._deaths: deque[float] = deque(maxlen=DEATHS)

    def ask_to_end(self, patience: float, *, at_once: bool = False) -> None:
        """Have the child end within so many seconds."""
        if self.child is not None:
            self.child.ask_to_end(at_once=at_once)
            self.deadline = time.monotonic() + patience

    def died(self) -> float | None:
        """Count a death; returns the wait before the next start, None if there were too many."""
        now = time.monotonic()
        self._deaths.append(now)
        recent = [when for when in self._deaths if now - when < WINDOW]
        if len(recent) == DEATHS:
            return None
        return float(BACKOFF * 2 ** (len(recent) - 1))

    def complaint(self, limit: float) -> str:
        """Say why the child must be killed; empty if it lives."""
        child = self.child
        if child is None:
            return ""
        silent = time.monotonic() - child.heard
        if silent > (limit if child.vitals else max(limit, START_TIMEOUT)):
            return f"no sign of life for {silent:.0f} s"
        stalled = child.vitals.stalled(limit) if child.vitals else []
        return f"does not go round: {', '.join(stalled)}" if stalled else ""


class Pool:
    """Keeps so many processes running.

    :param command: starts one.
    :param patience: seconds one may take to end in order.
    :param silence: seconds without a sign of life after which one is killed and replaced; one
        with a handler that runs on so long after its time limit is replaced in order.
    :param burst: end when each process has ended with 0.
    """

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        patience: float,
        silence: float,
        *,
        burst: bool = False,
    ) -> None:
        self._command = command
        self._slots = [Slot(number) for number in range(1, processes + 1)]
        self._patience = patience + GRACE
        self._silence = max(silence, LEAST_SILENCE)
        self._burst = burst
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._restarting: deque[Slot] = deque()
        #: The exit code, once the end has begun.
        self._code: int | None = None
        self._beat = time.monotonic()

    def run(self) -> int:
        """Run until a signal, the end of a burst, or a crash loop; returns the exit code.

        Call it in the main thread.
        """
        with caught_signals(self._signals.put):
            try:
                while self._code is None or any(slot.child for slot in self._slots):
                    self._turn()
            finally:
                for slot in self._slots:
                    if slot.child is not None:
                        slot.child.close()
        _log.info("stopped")
        return self._code

    def health(self) -> tuple[bool, dict[str, dict[str, Any]]]:
        """Say whether the parent lives, and how each process is; from any thread."""
        live = time.monotonic() - self._beat < HELD_UP * 2
        return live, {f"process {slot.number}": self._row(slot) for slot in self._slots}

    def _row(self, slot: Slot) -> dict[str, Any]:
        child = slot.child
        vitals = child.vitals if child else None
        if slot.done:
            return {"status": "ok", "restarts": slot.restarts}
        if child is None or vitals is None:
            return {"status": "failed", "failed": ["started"], "restarts": slot.restarts}
        failed = vitals.failed + vitals.stalled(self._silence)
        if time.monotonic() - child.heard > self._silence:
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

    def _turn(self) -> None:
        number = self._signal_within(TICK)
        if number is not None:
            self._on_signal(number)
        now = time.monotonic()
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
        """Whether others may be restarted: it is well, or no better than it will get."""
        child = slot.child
        if child is None or child.vitals is None or slot.deadline is not None:
            return slot.done
        return not child.vitals.failed or time.monotonic() - child.started > SETTLE

    def _start_if_due(self, slot: Slot) -> None:
        if self._code is not None or slot.done or time.monotonic() < slot.due:
            return
        try:
            slot.child = Child(self._command)
        except OSError as error:
            self._replace(slot, f"cannot be started: {error}")

    def _look_after(self, slot: Slot, child: Child) -> None:
        child.listen()
        code = child.poll()
        if code is not None:
            self._on_end(slot, child, code)
        elif slot.deadline is not None:
            if time.monotonic() > slot.deadline:
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
        if self._code is not None:
            if was_up and code not in (0, -signal.SIGTERM):
                self._code = self._code or 1
                _log.warning("process %d %s", slot.number, exit_text(code))
        elif asked:
            slot.restarts += 1
        elif code == 0 and self._burst:
            slot.done = True
            if all(one.done for one in self._slots):
                self._end(0)
        elif code == _MISUSED:
            self._end(_MISUSED)
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
            self._end(1)
            return
        _log.error("process %d %s; another is started in %g s", slot.number, why, wait)
        slot.restarts += 1
        slot.due = time.monotonic() + wait

    def _end(self, code: int) -> None:
        self._code = code
        self._restarting.clear()
        for slot in self._slots:
            slot.ask_to_end(self._patience)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._code is not None:
            _log.warning("%s again: ending at once", name)
            for slot in self._slots:
                slot.ask_to_end(URGENT, at_once=True)
        elif name == "SIGHUP" and not os.isatty(0):
            _log.info("SIGHUP: restarting the processes, one after the other")
            self._restarting = deque(slot for slot in self._slots if not slot.done)
        else:
            _log.info("%s: ending in order; once more ends at once", name)
            self._end(0)
