"""What must not get slower as there is more of it: the backlog, the subscribers, the payload.

``make bench ARGS=growth`` takes some minutes, most of which fill tables and streams; it also
draws the curves and writes the tables of the documentation.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flask import Flask

from flask_natspubsub import NatsPubsub

from .curves import Curve, svg, tables
from .growth_outbox import look_curves, milliseconds, relay_curves
from .harness import Comparison
from .peers import NatsPy, RawSocket, per_second

SIZES = (1_000, 10_000, 100_000, 1_000_000)
SUBSCRIBERS = (1, 10, 100)
IDLE_SUBSCRIBERS = (1, 20, 100)
IDLE_SECONDS = 12
SUBJECTS = (10, 100, 1_000, 10_000)
PAYLOADS = (1_000, 10_000, 100_000, 1_000_000)
MESSAGES = 10_000
MEGABYTES = 20
PAGE = 50
DOCS = Path(__file__).parents[2] / "docs"
#: What the largest size has to keep of the smallest; noise and caches take their share.
MUST = 0.25
BARE = "bare sockets: the server alone"
_PAGE = """.. This is written by ``make bench ARGS=growth``.

.. image:: _static/growth.svg
   :alt: Curves that stay flat from a thousand to a million

"""


def comparisons(url: str, rounds: int) -> list[Comparison]:
    """Measure all curves once, draw them, and compare the largest size with the smallest."""
    parts: list[Callable[[], list[Curve]]] = [
        lambda: relay_curves(SIZES),
        lambda: look_curves(SIZES),
        lambda: dead_letter_curves(url),
        lambda: subscriber_curves(url),
        lambda: [subject_curve(url), payload_curve(url), idle_curve(url)],
    ]
    curves: list[Curve] = []
    for number, part in enumerate(parts, 1):
        print(f"\r\033[K  growth, part {number}/{len(parts)}", end="", file=sys.stderr)
        curves += part()
    print("\r\033[K", end="", file=sys.stderr)
    (DOCS / "_static" / "growth.svg").write_text(svg(curves), "utf-8")
    (DOCS / "performance-growth.rst").write_text(_PAGE + tables(curves), "utf-8")
    # What idles costs a little for each subscriber, and next to nothing in all; what the server
    # does by itself is not ours to keep flat.
    free = {"An idle worker", BARE}
    return [
        curve.comparison(None if free & {curve.panel, curve.name} else MUST) for curve in curves
    ]


@contextmanager
def _shop(url: str, env: str, **settings: Any) -> Iterator[NatsPubsub]:
    app = Flask("shop")
    app.config.update(
        NATSPUBSUB_URLS=url, NATSPUBSUB_ENV=env, NATSPUBSUB_PUBLISH_TIMEOUT=60, **settings
    )
    pubsub = NatsPubsub(app)
    with app.app_context():
        try:
            yield pubsub
        finally:
            pubsub.shutdown(app)


# --- dead letters


def dead_letter_curves(url: str) -> list[Curve]:
    """Measure a page of dead letters, at both ends of more and more of them."""
    panel = f"Dead letters: a page of {PAGE}"
    first, last, new = (
        Curve(panel, name, "dead letters", "ms")
        for name in ("the first", "the last", "none newer than a second")
    )
    raw = RawSocket(url)
    with _shop(url, "growth") as pubsub:
        assert pubsub.is_connected
        stored = 0

        def page(expected: int, **which: Any) -> Callable[[], None]:
            def read() -> None:
                assert len(list(pubsub.dead_letters.list(**which))) == expected

            return read

        for size in SIZES:
            while stored < size:
                raw.publish("growth.dlq.shop.mailer", 1_000)
                stored += 1_000
            time.sleep(1.1)  # none is newer than a second from here on
            first.add(size, milliseconds(page(PAGE, limit=PAGE)))
            last.add(size, milliseconds(page(PAGE, limit=PAGE, after=str(size - PAGE))))
            new.add(size, milliseconds(page(0, newer_than=1)))
    raw.close()
    return [first, last, new]


# --- subscribers, subjects, payloads


def subscriber_curves(url: str) -> list[Curve]:
    """Measure a worker with more and more subscribers, each with a topic of its own.

    The server looks at each message for every consumer of the stream, so what it can do by
    itself is measured too.
    """
    panel = "One worker: published and handled"
    rate, bare = (
        Curve(panel, name, "subscribers", "a second", False) for name in ("no-op handlers", BARE)
    )
    cost = Curve("One worker: its own part", "processor time", "subscribers", "us a message")
    start = Curve("Start of a worker", "for each subscriber", "subscribers", "ms")
    for count in SUBSCRIBERS:
        seconds, handled, processor = _work(url, count)
        start.add(count, seconds * 1000 / count)
        rate.add(count, handled)
        cost.add(count, processor * 1_000_000)
        bare.add(count, _bare(url, count))
    return [rate, bare, cost, start]


def _bare(url: str, consumers: int) -> float:
    """Return how many messages a second the server takes, delivers and has acknowledged."""
    stream, names = f"bare{consumers}", [f"c{number}" for number in range(consumers)]
    subjects = [f"{stream}.{name}" for name in names]
    client, sender, receiver = NatsPy(url), RawSocket(url), RawSocket(url)
    try:
        client.call(client.js.add_stream(name=stream, subjects=[f"{stream}.>"]))
        for subject, name in zip(subjects, names, strict=True):
            client.make_consumer(subject, stream, name)
        publish = threading.Thread(target=sender.publish_in_turn, args=(subjects, MESSAGES))
        publish.start()
        each = MESSAGES // consumers
        rate = per_second(MESSAGES, lambda: receiver.pull_from_all(stream, names, each))
        publish.join()
        return rate
    finally:
        for one in (client, sender, receiver):
            one.close()


def _work(url: str, subscribers: int) -> tuple[float, float, float]:
    """Return the seconds until all pull; messages handled a second; seconds of CPU for each."""
    done, numbers = threading.Event(), itertools.count(1)

    def handle(message: dict[str, object]) -> None:
        if next(numbers) == MESSAGES:
            done.set()

    with _shop(url, f"growth{subscribers}") as pubsub:
        for number in range(subscribers):
            pubsub.subscriber(f"topic{number}", name=f"s{number}")(handle)
        assert pubsub.is_connected
        worker = pubsub.make_worker()
        started = time.perf_counter()
        try:
            worker.start()
            seconds, started = time.perf_counter() - started, time.perf_counter()
            processor = time.process_time()
            pubsub.publish_many([(f"topic{n % subscribers}", {"n": n}) for n in range(MESSAGES)])
            if not done.wait(60):
                raise TimeoutError("the worker did not finish")
            processor = time.process_time() - processor
            return seconds, MESSAGES / (time.perf_counter() - started), processor / MESSAGES
        finally:
            worker.stop()


def idle_curve(url: str) -> Curve:
    """Measure the processor time of a worker that has nothing to do."""
    curve = Curve("An idle worker", "processor time", "subscribers", "% of a core")
    for count in IDLE_SUBSCRIBERS:
        with _shop(url, f"idle{count}") as pubsub:
            for number in range(count):
                pubsub.subscriber(f"topic{number}", name=f"s{number}")(lambda message: None)
            with pubsub.run_worker():
                time.sleep(1)  # the pulls are made
                started = time.process_time()
                time.sleep(IDLE_SECONDS)
                curve.add(count, (time.process_time() - started) / IDLE_SECONDS * 100)
    return curve


def subject_curve(url: str) -> Curve:
    """Measure publishing to more and more subjects."""
    curve = Curve(
        "Publishing", "publish_many, distinct subjects", "subjects", "messages a second", False
    )
    with _shop(url, "growths") as pubsub:
        for count in SUBJECTS:
            messages = [(f"order.number{n % count}", {"n": n}) for n in range(MESSAGES)]
            pubsub.publish_many(messages)
            curve.add(
                count, max(per_second(MESSAGES, _publishing(pubsub, messages)) for _ in range(3))
            )
    return curve


def payload_curve(url: str) -> Curve:
    """Measure publishing larger and larger messages."""
    curve = Curve("Payloads", "publish_many", "bytes", "MB a second", False)
    with _shop(url, "growthp") as pubsub:
        for size in PAYLOADS:
            messages = [("blob", {"x": "y" * size})] * (MEGABYTES * 1_000_000 // size)
            run = _publishing(pubsub, messages)
            curve.add(size, max(per_second(MEGABYTES, run) for _ in range(3)))
    return curve


def _publishing(pubsub: NatsPubsub, messages: list[Any]) -> Callable[[], object]:
    return lambda: pubsub.publish_many(messages)
