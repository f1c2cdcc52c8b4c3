"""Scenario 5: many relays on one outbox."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.support.processes import Child
from tests.support.waiting import eventually

from .ledger import Result, count_sent
from .run import Run
from .site import Site

WRITERS = 4
KEYS = 50
#: Longest time until the partitions of a killed relay are another's; seconds.
TAKE_OVER = 15.0
#: And of one that was stopped in order.
HAND_OVER = 5.0
#: Each row of a partition, with the row of the same key that was to be sent before it.
OUT_OF_ORDER = """
    SELECT count(*) FROM (
        SELECT stream_sequence - lag(stream_sequence) OVER (PARTITION BY ordering_key ORDER BY id)
        AS step FROM natspubsub_outbox
    ) AS steps WHERE step <= 0
"""


def many_relays(run: Run) -> Result:
    """Each row is sent once and in order; partitions of a dead relay are taken over."""
    relays, rows = run.size["relays"], run.size["rows"]
    with Site(run.database("postgresql"), outbox_partitions=relays) as site:
        running = [site.start_relay() for _ in range(relays)]
        _write(site, rows)
        _await_sent(run, site, rows)
        result = count_sent(run.name, site)
        holders = len(_holders(site))
        disorder = site.number(OUT_OF_ORDER)
        result.expect(not disorder, f"{disorder} rows overtook another of their key")
        killed = _seconds_after(site, running, Child.kill)
        stopped = _seconds_after(site, running, Child.terminate)
        result.facts = {
            "relays": relays,
            "with a lease": holders,
            "s after kill": killed,
            "s after SIGTERM": stopped,
        }
        result.expect(killed <= TAKE_OVER, f"taken over {killed:.1f} s after a kill")
        result.expect(stopped <= HAND_OVER, f"handed over in {stopped:.1f} s")
    return result


def _write(site: Site, rows: int) -> None:
    """Write from several threads at once, each with ordering keys of its own."""

    def write(writer: int) -> None:
        keys = [f"{writer}-{number}" for number in range(KEYS)]
        site.publish(rows // WRITERS, keys, each=100)

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(WRITERS)))


def _await_sent(run: Run, site: Site, rows: int) -> None:
    left = rows

    def fewer() -> bool:
        return site.pending < left

    while left:
        eventually(fewer, 60, "no relay sends", 0.2)
        left = site.pending
        run.progress("rows", rows - left, rows)


def _seconds_after(site: Site, running: list[Child], end: Callable[[Child], None]) -> float:
    """End a relay that holds a partition; returns the seconds until others send its rows."""
    holders = _holders(site)
    victim = next(child for child in running if child.pid in holders)
    running.remove(victim)
    end(victim)
    began = time.monotonic()
    site.publish(200, [f"after-{number}" for number in range(KEYS)])
    eventually(lambda: not site.pending, 60, "nobody took over")
    return time.monotonic() - began


def _holders(site: Site) -> set[int]:
    persistence = site.state.persistence
    assert persistence is not None
    return {int(one["owner"].split(":")[1]) for one in persistence.store.leases.holders()}
