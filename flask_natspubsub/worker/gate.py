"""Many at once, or one alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Gate:
    """Lets many in at once, or one alone; each says who it is.

    While nobody wants to be alone, to enter and to leave takes no lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._inside: set[object] = set()
        self._alone: object | None = None

    def enter(self, who: object) -> None:
        """Enter with others; waits while somebody is, or wants to be, alone."""
        # First in, then the look: who wants to be alone says so first and looks then.
        self._inside.add(who)
        while self._alone is not None:
            self.leave(who)
            with self._lock:
                self._changed.wait_for(lambda: self._alone is None)
            self._inside.add(who)

    @contextlib.contextmanager
    def alone(self, who: object) -> Iterator[None]:
        """Keep others out, wait until all have left, be alone."""
        with self._lock:
            self._changed.wait_for(lambda: self._alone is None)
            self._alone = who
            self._changed.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            self.leave(who)

    def leave(self, who: object) -> None:
        """Count ``who`` as gone, as one that hangs inside; leaving twice does no harm."""
        self._inside.discard(who)
        if self._alone is None:
            return  # so nobody waits
        with self._lock:
            if self._alone is who:
                self._alone = None
            self._changed.notify_all()
