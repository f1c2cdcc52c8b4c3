"""What it costs that the server writes to its disk before it acknowledges."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack

from flask import Flask

from flask_natspubsub import NatsPubsub
from tests.support.servers import NatsServer

from .harness import Comparison, Variant, measure
from .peers import in_threads, per_second
from .publish import MESSAGE

ONE_BY_ONE = 200
MANY = 1_000


def comparisons(url: str, rounds: int) -> list[Comparison]:
    """Measure publishing with ``sync_interval: always`` against the default of two minutes."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        config = f"jetstream {{ store_dir: {json.dumps(folder)}, sync_interval: always }}"
        careful = stack.enter_context(NatsServer(config, jetstream=False))
        ours, usual = _variants(careful.url, "always", stack), _variants(url, "default", stack)
        return measure(list(map(Comparison, ours, usual)), rounds)


def _variants(url: str, name: str, stack: ExitStack) -> list[Variant]:
    app = Flask("shop")
    app.config.update(NATSPUBSUB_URLS=url, NATSPUBSUB_ENV="bench", NATSPUBSUB_PUBLISH_TIMEOUT=30)
    pubsub = NatsPubsub(app)
    stack.callback(pubsub.shutdown, app)
    batch = [("order.created", MESSAGE)] * MANY

    def publish() -> None:
        with app.app_context():
            pubsub.publish("order.created", MESSAGE)

    def publish_many() -> None:
        with app.app_context():
            pubsub.publish_many(batch)

    def variant(what: str, number: int, run: Callable[[], object]) -> Variant:
        return Variant(f"{what}, {name}", lambda: per_second(number, run))

    return [
        variant("publish, 1 thread", ONE_BY_ONE, lambda: in_threads(1, ONE_BY_ONE, publish)),
        variant("publish, 8 threads", ONE_BY_ONE, lambda: in_threads(8, ONE_BY_ONE, publish)),
        variant(f"publish_many({MANY:,})", MANY, publish_many),
    ]
