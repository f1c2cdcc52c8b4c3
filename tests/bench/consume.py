"""Consuming: a worker with a handler that does nothing."""

from __future__ import annotations

import itertools
import threading

from flask import Flask

from flask_natspubsub import NatsPubsub

from .harness import Comparison, Variant, measure
from .peers import NatsPy, per_second

COUNT = 10_000
STREAM = "bench-events-stream"
SUBJECT = "bench.shop.order.created"


def comparisons(url: str, rounds: int) -> list[Comparison]:
    """Measure a worker with 8 threads against nats-py's fetch, which does not even decode."""
    app = Flask("shop")
    app.config.update(NATSPUBSUB_URLS=url, NATSPUBSUB_ENV="bench", NATSPUBSUB_PUBLISH_TIMEOUT=30)
    publisher = NatsPubsub(app)
    with app.app_context():
        publisher.publish_many([("order.created", {"order_id": n}) for n in range(COUNT)])
    naive = NatsPy(url)
    numbers = itertools.count()
    try:
        worker = Variant("worker, 8 threads, no-op", lambda: _worker(url, next(numbers)))
        fetch = Variant(
            "nats-py fetch(100) + ack",
            lambda: per_second(
                COUNT, lambda: naive.fetch(SUBJECT, STREAM, f"naive{next(numbers)}", COUNT, 100)
            ),
        )
        return measure([Comparison(worker, fetch, 2)], rounds)
    finally:
        naive.close()
        publisher.shutdown()


def _worker(url: str, number: int) -> float:
    """Work off the stream with a durable of its own."""
    app = Flask("shop")
    app.config.update(NATSPUBSUB_URLS=url, NATSPUBSUB_ENV="bench", NATSPUBSUB_CONCURRENCY=8)
    pubsub = NatsPubsub(app)
    done = threading.Event()
    count = itertools.count(1)

    @pubsub.subscriber("order.created", name=f"ours{number}")
    def handle(message: dict[str, object]) -> None:
        if next(count) == COUNT:
            done.set()

    with app.app_context():
        worker = pubsub.make_worker()
        pubsub.is_connected  # noqa: B018 - connect beforehand

    def run() -> None:
        worker.start()
        if not done.wait(60):
            raise TimeoutError("the worker did not finish")

    try:
        return per_second(COUNT, run)
    finally:
        worker.stop()
        pubsub.shutdown()
