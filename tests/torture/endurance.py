"""Scenarios 9 and 10: many messages and many forks leave nothing behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.support.forking import in_child
from tests.support.waiting import eventually

from .ledger import Result
from .run import Run
from .site import Site

BATCH = 500
#: Parts of a run; the first warms the processes up.
PARTS = 10
#: Largest growth of a process after the first part, MB.
MOST_GROWTH = 20.0
#: Messages that each child publishes.
EACH_CHILD = 3


class Footprint(NamedTuple):
    """Resources of a process: memory in MB, threads, file descriptors."""

    memory: float
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """Read it from ``/proc``."""
        process = Path("/proc") / str(pid)
        lines = (process / "status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        memory, threads = status["VmRSS"].split()[0], status["Threads"]
        return cls(int(memory) / 1024, int(threads), len(list((process / "fd").iterdir())))


def soak(run: Run) -> Result:
    """Very many messages through one publisher and one worker: neither grows."""
    messages = run.size["messages"]
    with Site(use_inbox=False) as site:
        worker = site.start_worker(concurrency=8)
        seen: dict[str, list[Footprint]] = {"publisher": [], "worker": []}
        for part in range(PARTS):
            for done in range(part * messages // PARTS, (part + 1) * messages // PARTS, BATCH):
                run.progress("messages", done, messages)
                site.publish_ticks(BATCH)
            eventually(site.is_consumed, 120, "the worker does not keep up", 0.1)
            seen["publisher"].append(Footprint.of(os.getpid()))
            seen["worker"].append(Footprint.of(worker.pid))
        stored = site.stored
        site.finish()
        handled = site.ticks
    lost, again = max(0, messages - handled), max(0, handled - messages)
    result = Result(run.name, messages, stored, handled, again, lost, 0.0)
    result.expect(stored == messages, f"{stored} of {messages} messages were stored")
    result.expect(handled == messages, f"{handled} of {messages} messages were handled")
    for name, (first, *others) in seen.items():
        growth = max(one.memory for one in others) - first.memory
        result.facts |= {f"{name} MB": first.memory, f"{name} grew by": growth}
        result.expect(growth <= MOST_GROWTH, f"the {name} grew by {growth:.1f} MB")
        result.expect(others[-1][1:] == first[1:], f"the {name} had {first}, then {others[-1]}")
    return result


def forks(run: Run) -> Result:
    """Children forked while threads publish: each publishes over a connection of its own."""
    children = run.size["forks"]
    with Site(use_inbox=False) as site:
        before = site.stored
        with _publishing(site) as published:
            for number in range(children):
                run.progress("forks", number, children)
                in_child(lambda: site.publish_ticks(EACH_CHILD), timeout=30)
        sent = sum(published) + children * EACH_CHILD
        stored = site.stored - before
    lost, again = max(0, sent - stored), max(0, stored - sent)
    result = Result(run.name, sent, sent, stored, again, lost, 0.0)
    result.facts = {"forks": children}
    result.expect(sent == stored, f"{sent} messages were acknowledged, {stored} are stored")
    return result


@contextmanager
def _publishing(site: Site, threads: int = 4) -> Iterator[list[int]]:
    """Publish in threads while the block runs; then how many messages each has published."""
    stop = threading.Event()
    published: list[int] = []

    def publish_on() -> int:
        count = 0
        while not stop.is_set():
            site.publish_ticks(1)
            count += 1
        return count

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(publish_on) for _ in range(threads)]
        try:
            yield published
        finally:
            stop.set()
        published += [future.result(30) for future in futures]
