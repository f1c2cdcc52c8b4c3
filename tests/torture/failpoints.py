"""Places at which a process kills itself, without warning.

``TORTURE_FAIL=mark:3`` in the environment of a process: the third time it comes to the place
``mark``, it is gone, as if the machine had been switched off.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flask_natspubsub.brokers.base import StoredAck
from flask_natspubsub.inbox import inbox
from flask_natspubsub.outbox import store, upkeep

FAIL = "TORTURE_FAIL"
LEASE = "TORTURE_LEASE"
#: A file to which a relay adds the ids of rows that the stream had already.
RESENT = "TORTURE_RESENT"

#: Between publish and mark, in the relay.
MARK = "mark"
#: In a handler: before its effect, after it, and after the commit but before the ack.
BEFORE, AFTER, COMMITTED = "before", "after", "committed"


class FailPoints:
    """Counts how often each place was reached; thread-safe."""

    def __init__(self, spec: str) -> None:
        self._place, _, count = spec.partition(":")
        self._count = int(count or 0)
        self._reached: Counter[str] = Counter()
        self._lock = threading.Lock()

    def reach(self, place: str) -> None:
        """Note that ``place`` is reached, and die there if it is this one's turn."""
        with self._lock:
            self._reached[place] += 1
            if place == self._place and self._reached[place] == self._count:
                os.kill(os.getpid(), signal.SIGKILL)


def install() -> FailPoints:
    """Put the fail-points of the environment into this process."""
    points = FailPoints(os.environ.get(FAIL, ""))
    _around(store.OutboxStore, "mark", before=lambda *marked: _on_mark(points, marked[2]))
    _around(inbox.HandlerWork, "commit", after=lambda: points.reach(COMMITTED))
    if seconds := os.environ.get(LEASE):
        upkeep.LEASE_SECONDS = float(seconds)
    return points


def _on_mark(points: FailPoints, sent: Mapping[int, StoredAck]) -> None:
    points.reach(MARK)
    resent = [row_id for row_id, ack in sent.items() if ack.duplicate]
    if resent and (path := os.environ.get(RESENT)):
        with Path(path).open("a") as file:
            file.writelines(f"{row_id}\n" for row_id in resent)


def _nothing(*args: Any) -> None:
    pass


def _around(
    owner: type,
    name: str,
    before: Callable[..., None] = _nothing,
    after: Callable[[], None] = _nothing,
) -> None:
    original = getattr(owner, name)

    def wrapper(*args: Any) -> Any:
        before(*args)
        result = original(*args)
        after()
        return result

    setattr(owner, name, wrapper)
