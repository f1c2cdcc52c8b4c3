"""Faults of the table in docs/reliability.md that concern the worker, on a real server."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_natspubsub import MessageContext, NatsPubsub
from flask_natspubsub.brokers.jetstream.pull import NatsDelivery
from flask_natspubsub.worker.worker import Worker
from tests.support.databases import sqlite_url
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

from .conftest import MakeShop
from .project import Project
from .shop import TIMEOUT, Shop
from .test_cli_worker import once_each, worker_with_prefetched_jobs

pytestmark = pytest.mark.real_server


class Ledger:
    """A shop with an inbox, and a table of what its handlers did."""

    def __init__(self, folder: Path, url: str, env: str) -> None:
        app = Flask("shop")
        app.config.update(
            SQLALCHEMY_DATABASE_URI=sqlite_url(folder),
            SQLALCHEMY_ENGINE_OPTIONS={"connect_args": {"timeout": 30}},
            NATSPUBSUB_URLS=url,
            NATSPUBSUB_ENV=env,
            NATSPUBSUB_USE_INBOX=True,
            NATSPUBSUB_ACK_WAIT=1,
        )
        self.db = db = SQLAlchemy(app)
        self.pubsub = NatsPubsub(app, db)
        self.effects = sa.Table("effects", db.metadata, sa.Column("n", sa.Integer))
        self.shop = Shop(self.pubsub)
        with app.app_context():
            db.create_all()

    def note(self, message: Any, context: MessageContext) -> None:
        """Have an effect; what a handler does."""
        self.db.session.execute(sa.insert(self.effects).values(n=message["n"]))

    def read(self) -> Counter[int]:
        """How often each message had its effect."""
        with self.shop.app.app_context():
            return Counter(self.db.session.scalars(sa.select(self.effects.c.n)))

    def close(self) -> None:
        self.pubsub.shutdown()
        with self.shop.app.app_context():
            self.db.engine.dispose()


@pytest.fixture
def ledger(tmp_path: Path, nats_server: NatsServer, env: str) -> Iterator[Ledger]:
    made = Ledger(tmp_path, nats_server.url, env)
    with made.shop:
        yield made
    made.close()


def test_acks_that_are_lost_repeat_no_effect(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ack, lost = NatsDelivery.ack, []

    def lose_some(delivery: NatsDelivery) -> None:
        if delivery.attempt == 1 and delivery.sequence % 10 == 0:
            lost.append(delivery.sequence)
            delivery.settled = True
        else:
            ack(delivery)

    monkeypatch.setattr(NatsDelivery, "ack", lose_some)
    ledger.shop.record("order.created", then=ledger.note)
    ledger.shop.work(concurrency=2)
    ledger.shop.publish("order.created", *range(100))

    eventually(lambda: len(lost) == 10, TIMEOUT)
    ledger.shop.wait_until_settled()
    assert ledger.read() == once_each(range(100))


def renew_nothing(worker: Worker) -> None:
    """Have a worker's messages run out of ``ack_wait``, as if its process had been frozen."""
    for consumer in worker._consumers:
        consumer.look_after = lambda now: []  # type: ignore[method-assign]


def test_a_late_ack_is_that_of_a_message_that_was_handled(make_shop: MakeShop) -> None:
    """It settles the delivery of another worker too, whose failure then changes nothing."""
    late, other = make_shop(ack_wait=1), make_shop(ack_wait=1)
    late_may_end, other_may_fail = threading.Event(), threading.Event()

    def fail(message: Any, context: MessageContext) -> None:
        other_may_fail.wait(TIMEOUT)
        raise ValueError("comes to nothing")

    first = late.record("order.created", then=lambda *_: late_may_end.wait(TIMEOUT) and None)
    second = other.record("order.created", then=fail)
    renew_nothing(late.work(concurrency=1))
    late.publish("order.created", 1)
    first.wait(1)
    worker = other.work(concurrency=1)
    second.wait(1)

    late_may_end.set()
    late.wait_until_settled()
    other_may_fail.set()

    eventually(lambda: not worker._consumers[0].in_hand)
    assert worker.stop()
    other.wait_until_settled()
    assert [context.attempt for context in first.contexts + second.contexts] == [1, 2]
    assert late.dead_letters == []


def test_a_handler_of_python_that_computes_is_renewed(shop: Shop) -> None:
    """It gives the interpreter away every few milliseconds."""

    def compute(message: Any, context: MessageContext) -> None:
        end = time.monotonic() + 4.5
        while time.monotonic() < end:
            pass

    seen = shop.record("order.created", then=compute, ack_wait=2)
    shop.work(concurrency=2)
    shop.publish("order.created", 1)

    seen.wait(1)
    shop.wait_until_settled()
    seen.wait(1)


def test_a_handler_that_keeps_the_interpreter_is_warned_of(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    sleep_with_the_interpreter = ctypes.PyDLL(None).usleep

    def then(message: Any, context: MessageContext) -> None:
        if context.attempt == 1:
            sleep_with_the_interpreter(1_600_000)

    seen = shop.record("order.created", then=then, ack_wait=1)
    shop.work(concurrency=2)
    shop.publish("order.created", 1)

    eventually(lambda: "mailer: this process stood still for" in caplog.text)
    shop.wait_until_settled()
    assert set(seen.numbers) == {1}
    assert shop.dead_letters == []


def test_two_different_signals_at_once_end_at_once_and_lose_nothing(project: Project) -> None:
    worker = worker_with_prefetched_jobs(project)

    worker.signal(signal.SIGINT)
    worker.signal(signal.SIGTERM)

    assert worker.wait(10) == 1
    assert "Traceback" not in worker.log
    assert len(project.noted("end")) == 200
    project.release()
    assert project.run("worker", "--burst").returncode == 0
    assert project.noted("end") == once_each(range(220))
