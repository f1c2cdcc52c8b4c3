"""Worker liveness: every loop is pinged once a second and must answer.

A process may exist and answer requests while one of its threads hangs or has ended. So the time
of the last answer is kept for each loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:  # it brings asyncio, which a parent process does without
    from ..worker import Worker

#: Seconds between two pings.
INTERVAL = 1.0
#: Seconds without an answer of a loop after which the process counts as not live.
LATE = 15.0


class Vitals(msgspec.Struct, frozen=True):
    """The state of a worker at one moment.

    :param loops: seconds since each loop last answered a ping.
    :param checks: by name, whether each thing that the worker needs is well.
    :param overdue: seconds that a handler has been running beyond its time limit.
    :param load: how many messages are in hand, with the limit.
    """

    loops: dict[str, float]
    checks: dict[str, bool]
    overdue: float = 0.0
    load: dict[str, int] = {}

    def stalled(self, limit: float) -> list[str]:
        """Return the loops that have not answered for more than ``limit`` seconds."""
        return [name for name, age in self.loops.items() if age > limit]

    @property
    def failed(self) -> list[str]:
        """The checks that are not well."""
        return [name for name, well in self.checks.items() if not well]


class Heartbeat:
    """Pings a worker's loops in a thread of its own.

    :param tell: called with the vitals after each ping; not any more once it raises OSError.
    :param interval: seconds between two pings.
    :param late: seconds without an answer after which a loop makes the process not live.
    """

    def __init__(
        self,
        worker: Worker,
        tell: Callable[[Vitals], None] | None = None,
        interval: float = INTERVAL,
        late: float = LATE,
    ) -> None:
        self._worker = worker
        self._tell = tell
        self._interval = interval
        self._late = late
        self._seen: dict[str, float] = {}
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="natspubsub-heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._expect_all()
        self._thread.start()

    def look_now(self) -> None:
        """Ping and tell now instead of at the end of the interval."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(2 * self._interval)

    def take(self) -> Vitals:
        """Return the worker's vitals as they are now."""
        now = time.monotonic()
        ages = {name: round(now - seen, 1) for name, seen in self._seen.copy().items()}
        worker = self._worker
        return Vitals(ages, worker.checks(), round(worker.overdue, 1), worker.load())

    def look(self) -> tuple[bool, dict[str, dict[str, Any]]]:
        """Return for the health endpoint whether all loops answer, and the row of each check."""
        vitals = self.take()
        stalled = vitals.stalled(self._late)
        rows: dict[str, dict[str, Any]] = {
            name: {"status": "ok" if well else "failed"} for name, well in vitals.checks.items()
        }
        rows["loops"] = {
            "status": "failed" if stalled else "ok", "failed": stalled, "seconds": vitals.loops
        }  # fmt: skip
        rows["messages"] = {"status": "ok", **vitals.load}
        return not stalled, rows

    def _expect_all(self) -> None:
        """Count each loop as seen at the start, so that one that never answers is missed."""
        now = time.monotonic()
        self._seen = dict.fromkeys(self._worker.loops, now)

    def _saw(self, name: str) -> None:
        self._seen[name] = time.monotonic()

    def _run(self) -> None:
        while not self._stopped:
            self._wake.clear()
            self._worker.ping(self._saw)
            self._say()
            self._wake.wait(self._interval)

    def _say(self) -> None:
        if self._tell is not None:
            try:
                self._tell(self.take())
            except OSError:
                self._tell = None  # the parent is gone, which others notice
