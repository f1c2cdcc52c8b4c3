"""Orders through real processes, one of which dies in the middle.

The kill of the web processes is in every run. The others need a minute, and show for the example
what the torture's ``worker-killed``, ``nats-down`` and ``headline`` show in every run.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import pytest

from example_app.demo.client import Client
from example_app.demo.processes import Processes, flask_command, free_port, gunicorn_command
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.real_server

TEAPOT = 1
STOCK = 1000  # what init-db gives the teapot
QUANTITY = 2  # so half of a thousand orders can be served


class Site:
    """The shop in production: nats-server, gunicorn and workers as processes."""

    def __init__(self, folder):
        self.folder = folder
        self.client = Client(free_port())
        self.statuses = Counter()

    def __enter__(self):
        with ExitStack() as stack:
            self.nats = stack.enter_context(NatsServer())
            environment = {
                "DATABASE_URL": f"sqlite:///{self.folder / 'shop.db'}",
                "FLASK_NATSPUBSUB_URLS": self.nats.url,
                # Messages of a dead worker are redelivered after this time.
                "FLASK_NATSPUBSUB_ACK_WAIT": "3",
                "FLASK_NATSPUBSUB_PUBLISH_TIMEOUT": "2",
            }
            self.processes = Processes(self.folder / "logs", environment)
            stack.enter_context(self.processes)
            self.processes.flask("init-db")
            self.start_web()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, error_type, *_):
        self._stack.close()
        if error_type:
            print(self.processes.log_tails(40))

    def start_web(self):
        self.processes.start("gunicorn", *gunicorn_command(self.client.port))
        eventually(lambda: self.client.get("/health/ready").status == 200, 30, "no gunicorn")

    def start_worker(self, name="worker"):
        self.processes.start(name, *flask_command("natspubsub", "worker", "--concurrency", "4"))

    @contextmanager
    def orders_arriving(self, count):
        """Customers order while the block runs; it ends when all have been accepted."""
        with ThreadPoolExecutor(6) as customers:
            futures = [customers.submit(self.order, f"cart-{i}") for i in range(count)]
            try:
                yield
            except BaseException:
                customers.shutdown(wait=False, cancel_futures=True)
                raise
            assert Counter(future.result() for future in futures) == {202: count}

    def order(self, key):
        """Order, again and again until it is accepted; count what the shop says."""
        status = self.client.order_surely(
            TEAPOT, QUANTITY, key, within=40, on_refusal=lambda a: self.statuses.update([a.status])
        ).status
        self.statuses[status] += 1
        return status

    def query(self, sql):
        with closing(sqlite3.connect(self.folder / "shop.db")) as connection:
            return connection.execute(sql).fetchall()

    def states(self):
        return Counter(dict(self.query("SELECT state, count(*) FROM orders GROUP BY state")))

    def settled(self):
        return sum(n for state, n in self.states().items() if state != "pending")

    def assert_everything_adds_up(self, count):
        def all_done():
            [(entries,)] = self.query("SELECT count(*) FROM audit_entries")
            [(waiting,)] = self.query(
                "SELECT count(*) FROM natspubsub_outbox WHERE status != 'sent'"
            )
            return self.settled() == count and entries == 2 * count and not waiting

        eventually(all_done, 60, "some orders were lost")
        served = min(count, STOCK // QUANTITY)
        assert self.states() == Counter(confirmed=served, rejected=count - served)
        [(stock,)] = self.query("SELECT stock FROM products WHERE id = 1")
        assert stock == STOCK - served * QUANTITY
        booked = "SELECT count(*), sum(quantity) FROM stock_movements WHERE state = 'booked'"
        assert self.query(booked) == [(served, STOCK - stock)]
        assert json.loads(self.processes.flask("natspubsub", "dlq", "list", "--json")) == []


@pytest.mark.long
def test_killing_the_worker_loses_no_order(tmp_path):
    with Site(tmp_path) as site:
        site.start_worker()
        with site.orders_arriving(1000):
            eventually(lambda: site.settled() >= 100, 30, "no orders settled")
            site.processes.kill("worker")
            assert site.settled() < 1000
            site.start_worker()
        site.assert_everything_adds_up(1000)


@pytest.mark.long
def test_an_outage_of_nats_loses_no_order(tmp_path):
    with Site(tmp_path) as site:
        site.start_worker()
        site.order("the first cart")
        eventually(lambda: site.settled() == 1, 30, "the worker does not work")
        with site.orders_arriving(999):
            eventually(lambda: site.statuses[202] > 200, 30, "no orders accepted")
            site.nats.stop()
            accepted = site.statuses[202]
            eventually(lambda: site.statuses[202] > accepted + 100, 30, "none without NATS")
            site.nats.start()
        assert set(site.statuses) == {202}
        site.assert_everything_adds_up(1000)


def test_killing_the_web_processes_loses_no_order_that_was_accepted(tmp_path):
    """Nobody relays yet: whatever was committed waits in the outbox."""
    with Site(tmp_path) as site:
        with site.orders_arriving(200):
            eventually(lambda: site.statuses[202] > 60, 30, "no orders accepted")
            site.processes.kill("gunicorn")
            site.start_web()
        assert site.states() == Counter(pending=200)
        site.start_worker()
        site.assert_everything_adds_up(200)


@pytest.mark.long
def test_two_workers_share_the_load(tmp_path):
    with Site(tmp_path) as site:
        site.start_worker("worker-1")
        site.start_worker("worker-2")
        with site.orders_arriving(300):
            pass
        site.assert_everything_adds_up(300)
        by_worker = dict(site.query("SELECT handled_by, count(*) FROM audit_entries GROUP BY 1"))

    assert len(by_worker) == 2
    assert min(by_worker.values()) > 60, by_worker
