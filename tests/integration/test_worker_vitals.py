"""Each loop of a worker, hung or ended while the process lives: its heartbeat stops."""

from __future__ import annotations

import threading

import pytest

from flask_natspubsub.worker.async_handlers import AsyncHandlers
from flask_natspubsub.worker.duty import LoopDuty
from flask_natspubsub.worker.processes.vitals import Heartbeat, Vitals
from flask_natspubsub.worker.worker import Worker
from tests.support.waiting import eventually

from .shop import TIMEOUT

pytestmark = pytest.mark.real_server

LIMIT = 0.5


class HalfRelay(LoopDuty):
    """A relay whose loop can end, and which can break the monitor."""

    def __init__(self):
        super().__init__("relay", self)
        self.is_alive, self.breaks = True, False
        self._end = threading.Event()

    def run(self):
        self._end.wait(TIMEOUT)

    def stop(self, timeout=None):
        self._end.set()

    def look_after(self, now):
        if self.breaks:
            raise RuntimeError("broken")
        return ()


class Site:
    """A worker with a subscriber that runs async handlers, and a relay."""

    def __init__(self, state):
        self.handlers, self.relay = AsyncHandlers(), HalfRelay()
        processors = state.make_processors(state.subscriptions(), self.handlers.run)
        self.worker = Worker(
            state.broker(), state.settings, processors, state.emit, self.handlers,
            duties=[self.relay], tick=0.02,
        )  # fmt: skip

    @property
    def async_loop(self):
        return self.handlers._loop.loop

    @property
    def pulling_loop(self):
        return self.worker._consumers[0]._consumption._session.loop.loop


@pytest.fixture
def site(shop):
    @shop.pubsub.subscriber("job.created", name="work")
    async def work(message):
        pass

    site = Site(shop.pubsub.state())
    with site.worker:
        shop.pubsub.publish("job.created", {"n": 1})
        eventually(lambda: site.handlers._loop is not None, TIMEOUT)
        yield site


@pytest.fixture
def heartbeat(site):
    told = []
    beating = Heartbeat(site.worker, told.append, interval=0.05, late=LIMIT)
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


def hang_pulling(site, block):
    block(site.pulling_loop)


def end_pulling(site, block):
    site.pulling_loop.call_soon_threadsafe(site.pulling_loop.stop)


def hang_async_handlers(site, block):
    block(site.async_loop)


def end_handler_threads(site, block):
    site.worker._queue.put(None)


def break_monitor(site, block):
    site.relay.breaks = True


def end_relay(site, block):
    site.relay.is_alive = False


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
def test_a_loop_that_hangs_or_ends_is_named(site, heartbeat, block, fault):
    eventually(lambda: heartbeat.told, TIMEOUT)
    assert heartbeat.take().loops.keys() == set(site.worker.loops)
    assert heartbeat.take().stalled(TIMEOUT) == []

    fault(site, block)

    name = FAULTS[fault]
    eventually(lambda: heartbeat.take().stalled(LIMIT) == [name], TIMEOUT, f"{name} was not missed")
    eventually(lambda: heartbeat.told[-1].stalled(LIMIT) == [name], TIMEOUT)


def test_the_health_endpoint_shows_a_late_loop(site, heartbeat, block):
    eventually(lambda: heartbeat.look()[0], TIMEOUT)
    assert all(row["status"] == "ok" for row in heartbeat.look()[1].values())

    block(site.async_loop)

    eventually(lambda: not heartbeat.look()[0], TIMEOUT)
    assert heartbeat.look()[1]["loops"]["failed"] == ["async handlers"]


def test_a_handler_beyond_its_time_limit_is_told(shop):
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

        def ping(self, saw):
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
