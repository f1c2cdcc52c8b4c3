"""Publishing: one at a time from threads, and many at once."""

from __future__ import annotations

from flask import Flask

from flask_natspubsub import NatsPubsub

from .harness import Comparison, Variant, measure
from .peers import NatsPy, RawSocket, in_threads, per_second

ONE_BY_ONE = 1_600
MANY = 5_000
MESSAGE = {"order_id": 1, "note": "x" * 150}
SUBJECT = "bench.shop.order.created"


def comparisons(url: str, rounds: int) -> list[Comparison]:
    """Measure publishing against nats-py used naively, and against a raw socket."""
    app = Flask("shop")
    app.config.update(NATSPUBSUB_URLS=url, NATSPUBSUB_ENV="bench", NATSPUBSUB_PUBLISH_TIMEOUT=30)
    pubsub = NatsPubsub(app)
    with app.app_context():
        pubsub.publish("order.created", MESSAGE)
    naive, raw = NatsPy(url), RawSocket(url)
    try:
        return measure(_pairs(pubsub, naive, raw), rounds)
    finally:
        naive.close()
        raw.close()
        pubsub.shutdown()


def _pairs(pubsub: NatsPubsub, naive: NatsPy, raw: RawSocket) -> list[Comparison]:
    def ours(threads: int) -> Variant:
        def one() -> None:
            pubsub.publish("order.created", MESSAGE)

        return Variant(
            f"publish, {threads} threads",
            lambda: per_second(ONE_BY_ONE, lambda: in_threads(threads, ONE_BY_ONE, one)),
        )

    def theirs(threads: int) -> Variant:
        def one() -> None:
            naive.publish_one(SUBJECT)

        return Variant(
            f"naive, {threads} threads",
            lambda: per_second(ONE_BY_ONE, lambda: in_threads(threads, ONE_BY_ONE, one)),
        )

    batch = [("order.created", MESSAGE)] * 1000

    def many() -> None:
        for _ in range(MANY // 1000):
            pubsub.publish_many(batch)

    def gather() -> None:
        for _ in range(MANY // 1000):
            naive.publish_gather(SUBJECT, 1000)

    publish_many = Variant("publish_many(1000)", lambda: per_second(MANY, many))
    musts = {1: 1.4, 8: 1.8, 32: 2.2}
    return [
        *(Comparison(ours(threads), theirs(threads), must) for threads, must in musts.items()),
        Comparison(
            publish_many, Variant("naive gather(1000)", lambda: per_second(MANY, gather)), 3
        ),
        Comparison(
            publish_many,
            Variant(
                "nats-py publish_async",
                lambda: per_second(MANY, lambda: naive.publish_async(SUBJECT, MANY)),
            ),
            1.8,
        ),
        Comparison(
            publish_many,
            Variant(
                "raw socket", lambda: per_second(MANY * 4, lambda: raw.publish(SUBJECT, MANY * 4))
            ),
            0.33,
        ),
    ]
