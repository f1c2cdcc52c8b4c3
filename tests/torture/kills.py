"""Scenarios 1 and 2: a relay and a worker kill themselves at the worst places."""

from __future__ import annotations

import json
import time
from collections import Counter

from flask_natspubsub.messages.message import Message
from tests.support.processes import Child

from . import failpoints
from .ledger import Result, count
from .run import Run
from .shop import TOPIC
from .site import Site, kill_in_turn

BATCH = 20
EACH_LIFE = 60


def relay_killed(run: Run, database: str = "sqlite") -> Result:
    """Killed between publish and mark: within the duplicate window the stream has no copies."""
    with Site(run.database(database), lease=0.7, outbox_batch_size=BATCH) as site:
        site.start_worker()
        _kill_relays(run, site)
        result = _end(run, site)
        result.facts |= {"kills": run.size["kills"], "copies": site.stored - result.committed}
        result.expect(site.stored == result.committed, "the stream has copies")
    return result


def relay_killed_late(run: Run) -> Result:
    """As before, but dead for longer than the duplicate window: copies, and one effect each."""
    window = {"duplicate_window": 1}
    with Site(None, lease=2, outbox_batch_size=BATCH, stream_config=window) as site:
        site.start_worker()
        _kill_relays(run, site)
        result = _end(run, site)
        copies = site.stored - result.committed
        result.facts |= {"kills": run.size["kills"], "copies": copies}
        result.expect(copies > 0, "no copies, so nothing was tried")
    return result


def _kill_relays(run: Run, site: Site) -> None:
    kills = run.size["kills"]

    def start() -> Child:
        return site.start_relay(f"{failpoints.MARK}:{run.random.randint(1, 3)}")

    def feed() -> None:
        if site.pending < EACH_LIFE:
            site.publish(EACH_LIFE, each=5)

    kill_in_turn(site, kills, start, feed, lambda done: run.progress("kills", done, kills))


def _end(run: Run, site: Site) -> Result:
    """Let a relay and a worker finish in peace, and count."""
    site.start_relay()
    site.finish()
    return count(run.name, site)


def worker_killed(run: Run, database: str = "sqlite") -> Result:
    """Killed before the effect, after it, and between commit and ack."""
    return _worker_killed(
        run, database, (failpoints.BEFORE, failpoints.AFTER, failpoints.COMMITTED), inbox=True
    )


def worker_killed_without_inbox(run: Run) -> Result:
    """The same without the inbox, to see that the ledger would show it."""
    result = _worker_killed(run, "sqlite", (failpoints.COMMITTED,), inbox=False)
    kills = run.size["kills"]
    result.expect(result.duplicates >= kills, f"{kills} kills, but no {kills} effects repeated")
    return result


def _worker_killed(run: Run, database: str, places: tuple[str, ...], *, inbox: bool) -> Result:
    kills = run.size["kills"]
    place_of: dict[int, str] = {}
    with Site(run.database(database), use_inbox=inbox) as site:

        def start() -> Child:
            place = run.random.choice(places)
            point = f"{place}:{run.random.randint(1, 12)}"
            child = site.start_worker(point)
            place_of[child.pid] = place
            return child

        def feed() -> None:
            if site.unhandled < EACH_LIFE:
                site.publish(EACH_LIFE)
                site.relay_all()

        dead = kill_in_turn(
            site, kills, start, feed, lambda done: run.progress("kills", done, kills)
        )
        site.start_worker()
        result = _end(run, site)
        result.facts |= {"kills": kills, **Counter(place_of[child.pid] for child in dead)}
    return result


def two_copies(run: Run, database: str = "sqlite") -> Result:
    """Two messages of one event id, to twenty handlers at once."""
    messages = run.size["messages"]
    with Site(run.database(database), slowness=0.01) as site:
        ids = [f"order-{number}" for number in range(messages)]
        published = dict.fromkeys(ids, time.time())
        _publish_twice(site, ids)
        for _ in range(2):
            site.start_worker(concurrency=10)
        site.finish(run.limit)
        result = count(run.name, site, sent=2 * messages, committed=published)
        result.facts["copies"] = site.stored - messages
        result.expect(site.stored == 2 * messages, "the stream took a copy for a duplicate")
    return result


def _publish_twice(site: Site, ids: list[str]) -> None:
    subject = f"torture.shop.{TOPIC}"
    copies = [
        Message(subject, _envelope(event_id), {"Nats-Msg-Id": f"{event_id}-{copy}"})
        for event_id in ids
        for copy in "ab"
    ]
    for start in range(0, len(copies), 1000):
        ticket = site.state.broker().submit(copies[start : start + 1000], 30)
        assert ticket.wait(30)


def _envelope(event_id: str) -> bytes:
    return json.dumps({"event_id": event_id, "topic": TOPIC, "message": {"total": 12}}).encode()
