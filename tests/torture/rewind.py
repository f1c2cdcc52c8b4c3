"""Scenario: the stream goes back to an old copy of itself, as after a loss of power."""

from __future__ import annotations

import shutil
import time

from tests.support.waiting import eventually

from .ledger import Result, count
from .run import Run
from .site import Site

WAYS = ("busy", "idle", "alive")
#: Longest time until a relay that has nothing to send notices; seconds.
NOTICE = 60.0
#: Messages a second that the worker handles at least, with its slow handler and SQLite.
SLOWEST = 25
COPY = "copy-of-the-store"


def stream_rewound(run: Run) -> Result:
    """Check that the outbox resends messages that a rewound stream has lost."""
    total = {"lost by the stream": 0, "of these not handled": 0, "s until noticed": 0.0}
    rounds, messages = run.size["rounds"], run.size["messages"]
    with Site(outbox_resend_on_rewind=True, slowness=0.02) as site:
        site.start_relay()
        for number in range(rounds):
            _rewind(run, site, messages, total, WAYS[number % len(WAYS)])
            run.progress("rounds", number + 1, rounds)
        site.finish()
        result = count(run.name, site)
        result.facts = {"rounds": rounds, **total}
        result.expect(_rewinds(site) == rounds, f"{_rewinds(site)} of {rounds} were noticed")
        result.expect(total["of these not handled"] > 0, "nothing had to be sent again")
    return result


def _rewind(run: Run, site: Site, messages: int, total: dict[str, float], way: str) -> None:
    """Send messages, copy the store, send more, kill the server, and start it on the copy.

    The worker has handled some of what the stream then loses: these must not happen again.
    The others are in nothing but the outbox.

    :param way: ``busy``: there is more to send afterwards; ``idle``: nothing, so the relay has to
        look by itself; ``alive``: the worker is not killed, and has messages in hand whose
        numbers are given to others meanwhile.
    """
    worker = site.start_worker()
    kept = int(messages * run.random.uniform(0.3, 0.7))
    _publish(site, kept)
    _copy_store(site)
    _publish(site, (messages - kept) // 2)
    if way != "alive":
        worker.kill()
    _publish(site, messages - kept - (messages - kept) // 2)
    noticed = _rewinds(site) + 1
    total["lost by the stream"] += messages - kept
    total["of these not handled"] += site.unhandled
    _restore_store(site)
    began = time.monotonic()
    if way != "idle":
        site.publish(10)
    eventually(lambda: _rewinds(site) == noticed, NOTICE, "the rewind is not noticed", 0.1)
    total["s until noticed"] = max(total["s until noticed"], time.monotonic() - began)
    eventually(lambda: not _is_reported(site), NOTICE, "the rewind is not repaired", 0.1)
    if way != "alive":
        worker = site.start_worker()
    site.await_effects(60 + messages / SLOWEST)
    worker.terminate()
    worker.await_end()


def _publish(site: Site, count: int) -> None:
    """Publish, and wait until the stream has acknowledged it all."""
    site.publish(count)
    eventually(lambda: site.pending == 0, NOTICE, "rows are still pending", 0.1)


def _copy_store(site: Site) -> None:
    """Copy what is on the disk while the server does not write."""
    site.nats.stop()
    shutil.copytree(site.nats.folder / "data", site.nats.folder / COPY)
    site.nats.start()


def _restore_store(site: Site) -> None:
    """Kill the server, and start it with what was on the disk when it was copied."""
    site.nats.kill()
    shutil.rmtree(site.nats.folder / "data")
    (site.nats.folder / COPY).rename(site.nats.folder / "data")
    site.nats.start()
    site.state.broker().connect(30)


def _rewinds(site: Site) -> int:
    return site.number("SELECT coalesce(max(rewinds), 0) FROM natspubsub_stream")


def _is_reported(site: Site) -> bool:
    return bool(site.number("SELECT count(*) FROM natspubsub_stream WHERE rewound_at IS NOT NULL"))
