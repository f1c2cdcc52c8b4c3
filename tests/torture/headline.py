"""Scenario 8: everything on the way is killed, and the link is cut, while customers order."""

from __future__ import annotations

from tests.support.waiting import eventually

from .ledger import Result
from .outages import Crew, Shop
from .run import Run
from .site import Site

#: Orders in one request. Each is a row and an event of its own.
EACH = 20
#: Relays, and workers.
LANES = 2
#: A message is back in hand after ``ack_wait``, a dead relay's rows after its lease.
LONGEST_RECOVERY = 60.0


def headline(run: Run) -> Result:
    """Orders over HTTP, relayed by two relays and handled by two workers, none of which lives long.

    Whichever is killed is at work: between two faults, there are new effects.
    """
    messages, kills, cuts = (run.size[name] for name in ("messages", "kills", "cuts"))
    faults = ["cut"] * cuts
    faults += [("worker", "relay", "web", "nats")[number % 4] for number in range(kills)]
    run.random.shuffle(faults)
    with Site(run.database("postgresql"), lease=2, proxied=True) as site:
        shop = Shop(site, EACH)
        crew = Crew(site, shop, lanes=LANES)
        for number, fault in enumerate(faults):
            run.progress("faults", number, len(faults))
            with shop.ordering(-(-messages // EACH // len(faults))):
                _await_effects(site, run.random.randint(1, 3 * EACH))
                if fault == "cut":
                    site.cut()
                else:
                    crew.replace(fault, run.random.randrange(LANES))
        while (missing := messages - shop.accepted * EACH) > 0:  # what was never answered
            shop.orders(-(-missing // EACH))
        site.finish(300)
        result = shop.count(run.name, site)
    result.facts |= {"killed": kills, "cut": cuts}
    result.facts |= {f"{name} killed": faults.count(name) for name in sorted({*faults} - {"cut"})}
    result.expect(result.committed >= messages, f"only {result.committed} were committed")
    return result


def _await_effects(site: Site, number: int) -> None:
    goal = site.last_effect + number
    eventually(lambda: site.last_effect >= goal, LONGEST_RECOVERY, "no more effects", 0.05)
