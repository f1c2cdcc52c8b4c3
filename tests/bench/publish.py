"""Publishing: one at a time from threads, and many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from flask import Flask

from flask_natspubsub import NatsPubsub

from .harness import Comparison, Variant, measure
from .peers import NatsPy, RawSocket, frames_of, in_threads, per_second
from .peers_bare import Bare

ONE_BY_ONE = 1_600
MANY = 5_000
MESSAGE = {"order_id": 1, "note": "x" * 150}
SUBJECT = "bench.shop.order.created"
BUSY = "the threads of a site do more than publish"


def comparisons(url: str, rounds: int) -> list[Comparison]:
    """Measure publishing against nats-py used naively, and against a raw socket."""
    app = Flask("shop")
    app.config.update(NATSPUBSUB_URLS=url, NATSPUBSUB_ENV="bench", NATSPUBSUB_PUBLISH_TIMEOUT=30)
    pubsub = NatsPubsub(app)
    with app.app_context():
        pubsub.publish("order.created", MESSAGE)  # connects
    naive, raw, bare = NatsPy(url), RawSocket(url), Bare(url, pubsub.state(app).settings)
    try:
        return measure(_pairs(pubsub, naive, raw, bare), rounds)
    finally:
        naive.close()
        raw.close()
        bare.close()
        pubsub.shutdown()


def _pairs(pubsub: NatsPubsub, naive: NatsPy, raw: RawSocket, bare: Bare) -> list[Comparison]:
    def threaded(name: str, threads: int, one: Callable[[], object]) -> Variant:
        return Variant(
            f"{name}, {threads} thread{'s' * (threads > 1)}",
            lambda: per_second(ONE_BY_ONE, lambda: in_threads(threads, ONE_BY_ONE, one)),
        )

    def ours() -> None:
        pubsub.publish("order.created", MESSAGE)

    def the_same_message() -> None:
        naive.publish_message(SUBJECT, MESSAGE)

    def barely() -> None:
        bare.publish("order.created", MESSAGE)

    batch = [("order.created", MESSAGE)] * 1000

    def block() -> None:
        for _ in range(MANY // 1000):
            with pubsub.batch() as together:
                for topic, message in batch:
                    together.publish(topic, message)

    async def gathered() -> None:
        for _ in range(MANY // 1000):
            await asyncio.gather(*(pubsub.publish_async(*one) for one in batch))

    def many() -> None:
        for _ in range(MANY // 1000):
            pubsub.publish_many(batch)

    def bare_many() -> None:
        for _ in range(MANY // 1000):
            bare.publish("order.created", MESSAGE, 1000)

    def gather() -> None:
        for _ in range(MANY // 1000):
            naive.publish_gather(SUBJECT, 1000)

    def gather_messages() -> None:
        for _ in range(MANY // 1000):
            naive.publish_gather_messages(SUBJECT, [MESSAGE] * 1000)

    def publish_async_messages() -> None:
        for _ in range(MANY // 1000):
            naive.publish_async_messages(SUBJECT, [MESSAGE] * 1000)

    def raw_frames() -> float:
        frames = frames_of(SUBJECT, MESSAGE, MANY * 4)
        return per_second(MANY * 4, lambda: raw.publish_frames(frames))

    def run_gathered() -> None:
        asyncio.run(gathered())

    publish_many = Variant("publish_many(1000)", lambda: per_second(MANY, many))
    naive_gather = Variant("naive gather(1000), plain", lambda: per_second(MANY, gather))
    one_by_one: list[Comparison] = []
    for threads, must in {1: 1.6, 8: 2.2, 32: 2.3}.items():
        publish = threaded("publish", threads, ours)
        one_by_one += [
            Comparison(publish, threaded("naive", threads, the_same_message), must, differs=BUSY),
            Comparison(publish, threaded("bare envelope", threads, barely), differs=BUSY),
        ]
    return [
        *one_by_one,
        Comparison(publish_many, naive_gather, 3),
        Comparison(Variant("batch() of 1000", lambda: per_second(MANY, block)), naive_gather),
        Comparison(
            Variant("gather(publish_async) of 1000", lambda: per_second(MANY, run_gathered)),
            Variant("naive gather(1000)", lambda: per_second(MANY, gather_messages)),
            1,
        ),
        Comparison(
            publish_many,
            Variant("nats-py publish_async", lambda: per_second(MANY, publish_async_messages)),
        ),
        Comparison(publish_many, Variant("raw socket, same frames", raw_frames), 0.35),
        Comparison(
            publish_many, Variant("bare envelope(1000)", lambda: per_second(MANY, bare_many))
        ),
    ]
