"""The states of a link: what may follow each, and how long each may last."""

from __future__ import annotations

import random
from enum import Enum
from typing import NamedTuple


class State(Enum):
    """What a link is doing, and what ends it."""

    #: Pauses: not tried yet, or the last try has failed, or the connection was lost.
    DOWN = "down"
    #: Pauses longer: the servers answer and do not want us. Who publishes is told at once.
    REFUSED = "refused"
    #: Connects and signs in. Deadline: ``Link.dial_deadline`` for each server.
    DIALLING = "dialling"
    #: Subscribes for every route. Deadline: ``Timing.subscribing``.
    SUBSCRIBING = "subscribing"
    #: Has the owner set up the streams. Deadline: ``Timing.setting_up``; a failure is logged and
    #: does not keep the link from being up.
    SETTING_UP = "setting up"
    #: Serves, until the connection closes: nats-py closes one that does not answer its pings.
    UP = "up"
    #: ``Link.close`` was called. Deadline: its ``timeout``.
    CLOSING = "closing"


#: The states that may follow each; ``CLOSING`` may follow any.
NEXT: dict[State, tuple[State, ...]] = {
    State.DOWN: (State.DIALLING,),
    State.REFUSED: (State.DIALLING,),
    State.DIALLING: (State.SUBSCRIBING, State.DOWN, State.REFUSED),
    State.SUBSCRIBING: (State.SETTING_UP, State.DOWN, State.REFUSED),
    State.SETTING_UP: (State.UP, State.DOWN),
    State.UP: (State.DOWN,),
    State.CLOSING: (),
}


class Timing(NamedTuple):
    """The deadlines of the states and the pauses of a link, in seconds."""

    #: Also the deadline of one subscription while the link is up.
    subscribing: float = 5.0
    setting_up: float = 30.0
    first_pause: float = 0.05
    longest_pause: float = 2.0
    #: All clients lose a server at the same moment; they return at any moment of this time.
    return_within: float = 1.0
    #: A connection that has lasted longer is followed by ``first_pause``.
    stable: float = 5.0
    refused_pause: float = 30.0
    #: Between two lines in the log that say that there is still no connection.
    log_interval: float = 10.0
    mend_interval: float = 1.0


TIMING = Timing()


def jittered(pause: float, timing: Timing = TIMING, *, was_up: bool = False) -> float:
    """Return about ``pause`` seconds, or any moment from now on if it ``was_up`` until now."""
    shortest, longest = pause / 2, pause / 2 + max(pause, timing.first_pause)
    if was_up:
        shortest, longest = 0.0, max(longest, timing.return_within)
    return random.uniform(shortest, longest)  # noqa: S311 - nothing secret
