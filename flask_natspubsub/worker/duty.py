"""Duties: what a worker does, each behind the same interface.

Consuming (``consumer.SubscriberConsumer``) is a duty, and so is everything that a ``LoopDuty``
runs in a thread, such as the relay with its housekeeping.

To add one, write a class with the members of ``Duty``, or a loop with those of ``Loop`` for a
``LoopDuty`` (``database.leased_loop.LeasedLoop`` is one whose leader is found by a lease). Then
let ``AppState.make_worker`` add it to the duties. Neither protocol has to be imported for that,
so a feature may stand below the worker in the order of imports.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from ..text import get_logger
from .consumer import Job

_log = get_logger("flask_natspubsub.worker")

#: Seconds until a loop that ended with an error is started again.
PAUSE = 1.0


class Duty(Protocol):
    """One kind of work of a worker.

    A worker starts its duties, pings and looks after them while it runs, and stops them in a
    fixed order; see ``Worker``. Methods are called from the worker's threads, never from the
    duty's own.
    """

    @property
    def name(self) -> str:
        """The name in health checks and heartbeats, such as ``subscriber audit``."""

    @property
    def outlasts_handlers(self) -> bool:
        """Whether it goes on while the last handlers finish, since they may leave it work.

        False for a duty that gives work to handlers: it is stopped before them.
        """

    def start(self) -> None:
        """Begin. An error is raised by ``Worker.start``, which then stops all duties."""

    def halt(self) -> None:
        """Begin nothing new; returns at once. ``stop`` follows."""

    def stop(self, timeout: float) -> None:
        """End within ``timeout`` seconds: hand back what has not begun, give up leases."""

    def abandon(self) -> None:
        """Hand back everything, also what has begun: the process ends without waiting."""

    @property
    def is_healthy(self) -> bool:
        """Whether it does its work now."""

    def is_idle(self) -> bool:
        """Whether there is nothing to do, here or, as far as it can be known, elsewhere.

        :raises NatsPubsubError: the server or the database could not be asked.
        """

    def wake(self) -> None:
        """Look for work now instead of when it is due; returns at once."""

    def look_after(self, now: float) -> Sequence[Job]:
        """Do what has to be done several times a second, such as renewing what is in hand.

        Called by the worker's monitor, which all duties share: it must return soon.

        :param now: the time on the monotonic clock.
        :returns: the jobs whose handler has run out of time; the worker replaces its thread.
        """

    def ping(self, saw: Callable[[], None]) -> None:
        """Call ``saw``, from the duty's own thread where it has one, to show that it goes round.

        Returns at once. A duty that hangs does not call ``saw``, and the process is replaced.
        """


class Loop(Protocol):
    """Work that goes round in one thread, for a ``LoopDuty``."""

    def run(self) -> None:
        """Go round until ``stop``; may be called again after an error."""

    def stop(self) -> None:
        """Make ``run`` return soon; returns at once."""

    def release(self) -> None:
        """Give up what others could go on with, such as leases; any thread."""

    def wake(self) -> None:
        """Look for work now; returns at once."""

    def is_idle(self) -> bool:
        """Whether there is nothing to do."""

    @property
    def is_alive(self) -> bool:
        """Whether ``run`` goes round."""


class LoopDuty:
    """A duty that is a loop in a thread of its own; started again should it end by an error.

    :param name: for health checks, heartbeats and the thread.
    """

    #: Handlers may write to the outbox in their last moment.
    outlasts_handlers = True

    def __init__(self, name: str, loop: Loop) -> None:
        self.name = name
        self.loop = loop
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(
            target=self._run, name=f"natspubsub-{self.name}", daemon=True
        )
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.loop.run()
            except BaseException:  # noqa: BLE001 - sys.exit() somewhere must not end the work
                _log.exception("the %s ended in an unforeseen way; it is started again", self.name)
                self._stopping.wait(PAUSE)
            else:
                return

    def halt(self) -> None:
        """Make the loop return once the work in hand is done."""
        self._stopping.set()
        self.loop.stop()

    def stop(self, timeout: float) -> None:
        """Halt, and wait for the end of the loop for at most ``timeout`` seconds."""
        self.halt()
        if self._thread is not None:
            self._thread.join(timeout)

    def abandon(self) -> None:
        """Give up the leases without waiting for the work in hand."""
        self.halt()
        self.loop.release()

    @property
    def is_healthy(self) -> bool:
        """Whether the loop goes round."""
        return self.loop.is_alive

    def is_idle(self) -> bool:
        """Whether the loop has nothing to do."""
        return self.loop.is_idle()

    def wake(self) -> None:
        """Let the loop look for work now."""
        self.loop.wake()

    def look_after(self, now: float) -> Sequence[Job]:
        """Do nothing: a loop has no handlers."""
        return ()

    def ping(self, saw: Callable[[], None]) -> None:
        """Call ``saw`` if the loop goes round, or does not have to."""
        if self._thread is None or self._stopping.is_set() or self.loop.is_alive:
            saw()
