"""Scenario 11: the database goes away and comes back."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.support.processes import Child
from tests.support.waiting import eventually, for_seconds

from .ledger import Result, count
from .run import Run
from .site import Site

ORDERS = 200
#: Largest share of a processor for a relay that waits for its database.
MOST_WORK = 0.05
#: Seconds from the database's return until an order made then has its effect.
LONGEST_RETURN = 15.0


def database_down(run: Run) -> Result:
    """PostgreSQL is stopped under a relay and a worker that are at work, and started again."""
    rounds, down = run.size["rounds"], run.size["down_s"]
    busiest = slowest = 0.0
    postgres = run.postgres()
    with Site(run.database("postgresql")) as site:
        relay, worker = site.start_relay(), site.start_worker()
        for number in range(rounds):
            run.progress("rounds", number, rounds)
            site.publish(ORDERS)
            before = site.last_effect
            eventually(lambda before=before: site.last_effect > before, 60, "no more effects")
            postgres.stop()
            try:
                for_seconds(1, lambda: None)  # what it costs to notice is not what waiting costs
                busiest = max(busiest, _work(relay, down))
            finally:
                postgres.start()
            began = time.monotonic()
            site.publish(1)
            eventually(lambda: not site.unhandled, 60, "not all is handled", 0.05)
            slowest = max(slowest, time.monotonic() - began)
        assert not any(child.has_ended for child in (relay, worker))
        site.finish()
        result = count(run.name, site)
    result.facts = {"stops": rounds, "s down": down, "% of a core": busiest * 100, "s": slowest}
    result.expect(busiest <= MOST_WORK, f"{busiest:.1%} of a core while there was no database")
    result.expect(slowest <= LONGEST_RETURN, f"{slowest:.1f} s until all was handled again")
    return result


def _work(child: Child, seconds: float) -> float:
    """Return the share of one processor that a process uses during ``seconds``."""
    before = _processor_seconds(child.pid)
    for_seconds(seconds, lambda: None)
    return (_processor_seconds(child.pid) - before) / seconds


def _processor_seconds(pid: int) -> float:
    fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    user, system = int(fields[11]), int(fields[12])
    return (user + system) / os.sysconf("SC_CLK_TCK")
