"""One run of a scenario: its size, seed, time limit and progress."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.support.databases import PostgresServer

from .ledger import Result

PROGRESS_INTERVAL = 5.0


class TooLong(Exception):
    """A scenario took longer than it may."""


@dataclass
class Run:
    """One run of one scenario.

    :param size: its numbers, such as how many kills.
    :param postgres: gives the server that scenarios share.
    :param limit: seconds after which it is given up.
    """

    name: str
    size: Mapping[str, int]
    seed: int
    postgres: Callable[[], PostgresServer]
    limit: float
    verbose: bool = False
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.name} {self.seed}")
        self._began = time.monotonic()
        self._shown = self._began

    def database(self, kind: str) -> str | None:
        """The address of a fresh database: ``postgresql``, or None for a file of the site's."""
        if kind == "sqlite":
            return None
        name = f"torture_{self.random.getrandbits(48):x}_{time.time_ns():x}"
        return self.postgres().url(name)

    def progress(self, what: str, done: int, total: int) -> None:
        """Print progress now and then.

        :raises TooLong: the time limit is reached.
        """
        now = time.monotonic()
        if now - self._began > self.limit:
            raise TooLong(f"{self.name}: {done} of {total} {what} after {self.limit:.0f} s")
        if self.verbose and now - self._shown > PROGRESS_INTERVAL:
            self._shown = now
            seconds = now - self._began
            print(f"  {self.name}: {done:,} of {total:,} {what}, {seconds:.0f} s", file=sys.stderr)


@dataclass(frozen=True)
class Scenario:
    """A scenario with its two sizes.

    :param limit: seconds that the long form may take.
    """

    name: str
    function: Callable[[Run], Result]
    short: Mapping[str, int]
    long: Mapping[str, int]
    limit: float = 1200.0
