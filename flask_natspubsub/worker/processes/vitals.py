"""Whether a worker lives: each of its loops is asked, again and again, to show that it goes round.

A process may be there and answer while one of its threads hangs or has ended. So each loop has
a time of its own: how long ago it was last seen to go round.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:  # it brings asyncio, which a parent process does without
    from ..worker import Worker

#: Seconds between two looks at the loops.
INTERVAL = 1.0
#: A loop that was not seen for so long makes the process not live; seconds.
LATE = 15.0


class Vitals(msgspec.Struct, frozen=True):
    """How a worker was at one moment.

    :param loops: seconds since each loop was last seen to go round.
    :param checks: what the worker needs to do its job, and whether it is well.
    :param overdue: for how many seconds a handler has been running beyond its time limit.
    :param load: how much it has in hand, with the limit.
    """

    loops: dict[str, float]
    checks: dict[str, bool]
    overdue: float = 0.0
    load: dict[str, int] = {}

    def stalled(self, limit: float) -> list[str]:
        """Return the loops not seen for more than ``limit`` seconds."""
        return [name for name, age in self.loops.items() if age > limit]

    @property
    def failed(self) -> list[str]:
        """The checks that are not well."""
        return [name for name, well in self.checks.items() if not well]


class Heartbeat:
    """Looks at a worker's loops every second, in a thread of its own.

    :param tell: gets each new finding; OSError ends the telling, not the looking.
    """

    def __init__(self, worker: Worker, tell: Callable[[Vitals], None] | None = None) -> None:
        self._worker = worker
        self._tell = tell
        self._seen: dict[str, float] = {}
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="natspubsub-heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._expect_all()
        self._thread.start()

    def look_now(self) -> None:
        """Look at once, not only when it is time: something has changed."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(2 * INTERVAL)

    def take(self) -> Vitals:
        """Say how the worker is now."""
        now = time.monotonic()
        ages = {name: round(now - seen, 1) for name, seen in self._seen.copy().items()}
        worker = self._worker
        return Vitals(ages, worker.checks(), round(worker.overdue, 1), worker.load())

    def look(self) -> tuple[bool, dict[str, dict[str, Any]]]:
        """Say for the health endpoint whether the loops go round, and how each check is."""
        vitals = self.take()
        stalled = vitals.stalled(LATE)
        rows: dict[str, dict[str, Any]] = {
            name: {"status": "ok" if well else "failed"} for name, well in vitals.checks.items()
        }
        rows["loops"] = {
            "status": "failed" if stalled else "ok", "failed": stalled, "seconds": vitals.loops
        }  # fmt: skip
        rows["messages"] = {"status": "ok", **vitals.load}
        return not stalled, rows

    def _expect_all(self) -> None:
        """Count each loop as seen at the start, so that one that never shows up is missed."""
        now = time.monotonic()
        self._seen = dict.fromkeys(self._worker.loops, now)

    def _saw(self, name: str) -> None:
        self._seen[name] = time.monotonic()

    def _run(self) -> None:
        while not self._stopped:
            self._wake.clear()
            self._worker.nudge(self._saw)
            self._say()
            self._wake.wait(INTERVAL)

    def _say(self) -> None:
        if self._tell is not None:
            try:
                self._tell(self.take())
            except OSError:
                self._tell = None  # the parent is gone, which others notice
