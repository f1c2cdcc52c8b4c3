"""A relay process that can be killed; run with ``python -m``.

Usage: DATABASE_URL NATS_URL ENV [KEY=VALUE ...]. It writes ``looked`` when it has looked for a
lease, ``leased`` when it has one, ``noticed`` when it knows that it has lost one, and at its end
``lost`` and how many it has lost.
``die_before_mark=N`` ends it, as by kill -9, after the N-th batch was published and before it
is marked; ``lease=SECONDS`` makes leases shorter.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from flask_natspubsub.outbox import upkeep
from flask_natspubsub.outbox.relay import Relay
from flask_natspubsub.outbox.store import OutboxStore

from .shop import OutboxShop


def say(*words: object) -> None:
    print(*words, flush=True)


def main(url: str, nats_url: str, env: str, *options: str) -> None:
    given = dict(option.split("=") for option in options)
    if "lease" in given:
        upkeep.LEASE_SECONDS = float(given.pop("lease"))
    if "die_before_mark" in given:
        die_before_mark(int(given.pop("die_before_mark")))
    settings: dict[str, Any] = {key: float(value) for key, value in given.items()}
    for key in ("outbox_batch_size", "outbox_partitions"):
        if key in settings:
            settings[key] = int(settings[key])
    with OutboxShop(url, env=env, urls=nats_url, tables=False, **settings) as shop:
        run(shop.relay())


def run(relay: Relay) -> None:
    signal.signal(signal.SIGTERM, lambda *_: relay.stop())
    thread = threading.Thread(target=relay.run)
    thread.start()
    news: dict[str, Callable[[], object]] = {
        "looked": lambda: relay.has_tried,
        "leased": lambda: relay.partitions,
        "noticed": lambda: relay.lease_lost,
    }
    while thread.is_alive():
        thread.join(0.02)
        for word in [word for word, happened in news.items() if happened()]:
            del news[word]
            say(word)
    say("lost", relay.lease_lost)


def die_before_mark(batches: int) -> None:
    mark, left = OutboxStore.mark, [batches]

    def failing(self: OutboxStore, *arguments: Any) -> bool:
        left[0] -= 1
        if not left[0]:
            os._exit(9)
        return mark(self, *arguments)

    OutboxStore.mark = failing  # type: ignore[method-assign]


if __name__ == "__main__":
    main(*sys.argv[1:])
