"""Each loop of a worker, hung or ended while the process lives: its heartbeat stops."""

from __future__ import annotations

import threading

import pytest

from flask_natspubsub.worker import worker as worker_module
from flask_natspubsub.worker.processes import vitals
from flask_natspubsub.worker.processes.vitals import Heartbeat, Vitals
from tests.support.waiting import eventually

from .shop import TIMEOUT

pytestmark = pytest.mark.real_server

LIMIT = 0.5


class HalfRelay:
    """A relay whose loop can end."""

    is_alive = True

    def run(self):
        pass

    def stop(self):
        pass


@pytest.fixture
def worker(shop, monkeypatch):
    """A worker with a subscriber that runs async handlers, and a relay."""
    monkeypatch.setattr(vitals, "INTERVAL", 0.05)
    monkeypatch.setattr(worker_module, "TICK", 0.02)

    @shop.pubsub.subscriber("job.created", name="work")
    async def work(message):
        pass

    worker = shop.pubsub.make_worker()
    worker._relay = HalfRelay()
    with worker:
        shop.pubsub.publish("job.created", {"n": 1})
        eventually(lambda: worker._async._loop is not None, TIMEOUT)
        yield worker


@pytest.fixture
def heartbeat(worker):
    told = []
    beating = Heartbeat(worker, told.append)
    beating.told = told
    beating.start()
    yield beating
    beating.stop()


@pytest.fixture
def block():
    """Make loops hang until the end of the test."""
    hanging = threading.Event()
    yield lambda loop: loop.call_soon_threadsafe(hanging.wait)
    hanging.set()


def pulling_loop(worker):
    return worker._consumers[0]._consumption._session.loop


def fail(*arguments):
    raise RuntimeError("broken")


def hang_pulling(worker, block, monkeypatch):
    block(pulling_loop(worker).loop)


def end_pulling(worker, block, monkeypatch):
    loop = pulling_loop(worker)
    loop.loop.call_soon_threadsafe(loop.loop.stop)


def hang_async_handlers(worker, block, monkeypatch):
    block(worker._async._loop.loop)


def end_handler_threads(worker, block, monkeypatch):
    worker._queue.put(None)


def break_monitor(worker, block, monkeypatch):
    monkeypatch.setattr(worker, "_look_after_all", fail)


def end_relay(worker, block, monkeypatch):
    worker._relay.is_alive = False


FAULTS = {
    hang_pulling: "subscriber work",
    end_pulling: "subscriber work",
    hang_async_handlers: "async handlers",
    end_handler_threads: "handler threads",
    break_monitor: "monitor",
    end_relay: "relay",
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of coroutines on a loop that was stopped
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_loop_that_hangs_or_ends_is_named(worker, heartbeat, block, monkeypatch, fault):
    eventually(lambda: heartbeat.told, TIMEOUT)
    assert heartbeat.take().loops.keys() == set(worker.loops)
    assert heartbeat.take().stalled(TIMEOUT) == []

    fault(worker, block, monkeypatch)

    name = FAULTS[fault]
    eventually(lambda: heartbeat.take().stalled(LIMIT) == [name], TIMEOUT, f"{name} was not missed")
    eventually(lambda: heartbeat.told[-1].stalled(LIMIT) == [name], TIMEOUT)


def test_the_health_endpoint_shows_a_late_loop(worker, heartbeat, block, monkeypatch):
    eventually(lambda: heartbeat.look()[0], TIMEOUT)
    assert all(row["status"] == "ok" for row in heartbeat.look()[1].values())
    monkeypatch.setattr(vitals, "LATE", LIMIT)

    block(worker._async._loop.loop)

    eventually(lambda: not heartbeat.look()[0], TIMEOUT)
    assert heartbeat.look()[1]["loops"]["failed"] == ["async handlers"]


def test_a_handler_beyond_its_time_limit_is_told(shop, monkeypatch):
    release = threading.Event()

    @shop.pubsub.subscriber("job.created", name="slow", timeout=0.1, max_deliver=1)
    def slow(message):
        release.wait(TIMEOUT)

    with shop.pubsub.run_worker() as worker:
        assert worker.overdue == 0
        shop.pubsub.publish("job.created", {"n": 1})
        eventually(lambda: worker.overdue > 0.2, TIMEOUT)
        release.set()
        eventually(lambda: worker.overdue == 0, TIMEOUT)


def test_a_parent_that_is_gone_is_told_no_more():
    class Idle:
        loops = ("monitor",)
        overdue = 0.0

        def checks(self):
            return {}

        def load(self):
            return {}

        def nudge(self, saw):
            saw("monitor")

    told = []

    def tell(found: Vitals) -> None:
        told.append(found)
        raise BrokenPipeError

    heartbeat = Heartbeat(Idle(), tell)
    heartbeat.start()
    eventually(lambda: told, TIMEOUT)
    heartbeat.look_now()
    eventually(lambda: heartbeat._tell is None, TIMEOUT)
    heartbeat.stop()
    assert len(told) == 1
