"""What one subscriber has in hand in a worker, and how much more it asks for."""

from __future__ import annotations

import random
import threading
from collections import deque

import msgspec
import pytest

from flask_natspubsub.brokers.base import ConsumerInfo
from flask_natspubsub.errors import BrokerError
from flask_natspubsub.worker import consumer as module
from flask_natspubsub.worker.consumer import Gate, SubscriberConsumer
from tests.support.clock import Clock
from tests.support.waiting import eventually

from .worker_helpers import FakeBroker, FakeDelivery, Rig


class Bench:
    """A consumer whose worker is a list of jobs, on a clock that stands still."""

    def __init__(self, clock, *, slots=10, prefetch=1_000, **options):
        self.clock = clock
        self.rig = Rig(lambda message: None, **options)
        self.broker = FakeBroker()
        self.queue = deque()
        self.consumer = SubscriberConsumer(
            self.broker,
            self.rig.processor,
            "test-events-stream",
            slots,
            prefetch,
            self.queue.append,
            Gate(),
        )
        self.deliveries = []
        self._release = threading.Event()
        self._hanging = []

    def start(self):
        self.consumer.start()
        return self

    @property
    def asked_for(self):
        return sum(self.broker.consumption.requests)

    def deliver(self, count=1):
        for _ in range(count):
            delivery = FakeDelivery(sequence=len(self.deliveries) + 1)
            self.deliveries.append(delivery)
            self.broker.deliver(delivery)

    def deliver_what_is_asked_for(self):
        self.deliver(self.asked_for - len(self.deliveries))

    def run(self, seconds=0.001):
        """Let a thread take the next job, which takes so long."""

        def process(delivery):
            self.clock.now += seconds
            delivery.ack()
            return "outcome"

        ran = self.run_by(process)
        if ran.following is not None:
            self.queue.appendleft(ran.following)
        return ran.outcome

    def run_by(self, process):
        """Run the next job, which ``process`` processes."""
        self.rig.processor.process = process
        return self.consumer.run(self.queue.popleft())

    def begin(self):
        """Let a thread take the next job and hang in it; returns the job."""
        job = self.queue.popleft()
        self.rig.processor.process = lambda delivery: self._release.wait(60)
        thread = threading.Thread(target=self.consumer.run, args=(job,))
        thread.start()
        self._hanging.append(thread)
        eventually(lambda: job.started is not None)
        return job

    def close(self):
        self._release.set()
        for thread in self._hanging:
            thread.join(10)


@pytest.fixture
def make(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    benches = []

    def make(**options):
        benches.append(Bench(clock, **options))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()


# --- how much is asked for


def test_at_first_it_asks_for_one_message_a_thread(make):
    assert make(concurrency=4).start().asked_for == 4


def test_it_asks_for_no_more_than_the_worker_has_threads(make):
    assert make(concurrency=50, slots=3).start().asked_for == 3


def test_an_ordered_subscriber_asks_for_one_at_a_time(make):
    bench = make(ordered=True).start()
    for number in range(1, 30):
        assert bench.asked_for == number
        bench.deliver_what_is_asked_for()
        assert len(bench.queue) == 1
        bench.run(0.00001)


def test_a_slow_handler_never_has_more_in_hand_than_threads(make):
    bench = make(concurrency=4, ack_wait=5).start()
    for _ in range(50):
        bench.deliver_what_is_asked_for()
        assert bench.consumer.in_hand == 4
        bench.run(seconds=1.0)


def test_every_thread_of_a_slow_handler_is_given_work_as_soon_as_it_is_free(make):
    bench = make(concurrency=8).start()
    bench.deliver_what_is_asked_for()
    for number in range(1, 20):
        bench.run(seconds=1.0)
        assert bench.asked_for == 8 + number
        bench.deliver_what_is_asked_for()


@pytest.mark.parametrize("prefetch", [1_000, 50])
def test_a_fast_handler_is_given_more_step_by_step_up_to_the_limit(make, prefetch):
    bench = make(concurrency=4, prefetch=prefetch).start()
    most = 4
    for _ in range(3000):
        bench.deliver_what_is_asked_for()
        assert bench.consumer.in_hand <= most * 2
        most = max(most, bench.consumer.in_hand)
        bench.run(seconds=0.0001)
    assert most == prefetch == bench.consumer.most_in_hand


def test_a_limit_below_the_number_of_handlers_keeps_none_of_them_idle(make):
    bench = make(concurrency=8, prefetch=1).start()
    for _ in range(50):
        bench.deliver_what_is_asked_for()
        assert bench.consumer.in_hand == 8
        bench.run(seconds=0.0001)


def test_a_fast_handler_asks_rarely(make):
    bench = make(concurrency=4).start()
    for _ in range(5000):
        bench.deliver_what_is_asked_for()
        bench.run(seconds=0.0001)
    assert len(bench.broker.consumption.requests) < 60


def test_what_is_in_hand_can_be_worked_off_well_within_ack_wait(make):
    ack_wait = 1.2
    bench = make(concurrency=2, ack_wait=ack_wait).start()
    for _ in range(400):
        bench.deliver_what_is_asked_for()
        bench.run(seconds=0.01)
    bench.deliver_what_is_asked_for()
    assert bench.consumer.in_hand * 0.01 / 2 <= ack_wait / 6


def test_a_handler_that_becomes_slow_is_given_less(make):
    bench = make(concurrency=2).start()
    for _ in range(300):
        bench.deliver_what_is_asked_for()
        bench.run(seconds=0.001)
    assert bench.consumer.in_hand > 100

    while bench.consumer.in_hand > 2:
        bench.run(seconds=1.0)
    for _ in range(10):
        bench.deliver_what_is_asked_for()
        assert bench.consumer.in_hand <= 2
        bench.run(seconds=1.0)


def test_it_never_forgets_or_repeats_a_message(make):
    """Random times, failures and orders of events: credits and slots must add up."""
    source = random.Random(5)
    bench = make(concurrency=3, slots=5).start()
    handled = 0
    for _ in range(3000):
        if len(bench.deliveries) < bench.asked_for and source.random() < 0.6:
            bench.deliver()
        elif bench.queue:
            handled += bench.run(seconds=source.choice([0.0001, 0.01, 2.0])) == "outcome"
        assert len(bench.queue) <= 3
    while len(bench.deliveries) > handled:
        handled += bench.run() == "outcome"

    assert all(delivery.fate == ("ack", None) for delivery in bench.deliveries)
    assert bench.consumer.in_hand == 0
    assert bench.asked_for - len(bench.deliveries) >= 3


# --- at work


def test_no_more_than_its_concurrency_is_handed_to_the_threads(make):
    bench = make(concurrency=2).start()
    bench.deliver(5)
    assert len(bench.queue) == 2
    for left in (2, 2, 2, 1, 0):
        bench.run()
        assert len(bench.queue) == left


def test_a_fault_while_processing_does_not_cost_a_slot(make):
    bench = make(concurrency=1).start()
    bench.deliver(2)

    def process(delivery):
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError):
        bench.run_by(process)
    assert len(bench.queue) == 1


def test_everything_in_hand_is_renewed_every_third_of_ack_wait(make):
    bench = make(concurrency=1, ack_wait=30).start()
    bench.deliver(2)
    bench.begin()
    for seconds, renewals in [(9.9, 0), (0.2, 1), (9.9, 1), (0.2, 2)]:
        bench.clock.now += seconds
        assert bench.consumer.look_after(bench.clock.now) == []
        for delivery in bench.deliveries:
            assert len(delivery.calls) == renewals


# --- time limits


def test_a_handler_out_of_time_gives_its_slot_away(make):
    bench = make(concurrency=1, timeout=5).start()
    bench.deliver(2)
    job = bench.begin()
    bench.clock.now += 5.1

    assert bench.consumer.look_after(bench.clock.now) == [job]
    assert job.expired
    assert [waiting.delivery for waiting in bench.queue] == bench.deliveries[1:]
    assert bench.consumer.look_after(bench.clock.now) == []


def test_time_spent_waiting_for_a_thread_does_not_count(make):
    bench = make(concurrency=1, timeout=5).start()
    bench.deliver(2)
    bench.run(seconds=60)
    assert bench.consumer.look_after(bench.clock.now) == []


def test_hung_handlers_do_not_use_up_what_may_be_in_hand(make):
    bench = make(concurrency=10, timeout=5).start()
    for round_number in range(1, 4):
        bench.deliver_what_is_asked_for()
        assert len(bench.deliveries) == 10 * round_number
        for _ in range(10):
            bench.begin()
        bench.clock.now += 5.1
        assert len(bench.consumer.look_after(bench.clock.now)) == 10
        assert bench.consumer.in_hand == 0


def test_a_handler_that_ends_after_all_changes_nothing(make):
    bench = make(concurrency=1, timeout=5).start()
    bench.deliver(3)

    def process(delivery):
        bench.clock.now += 5.1
        assert len(bench.consumer.look_after(bench.clock.now)) == 1
        return "outcome"

    bench.run_by(process)
    assert len(bench.queue) == 1, "only one slot was given away"
    bench.run()
    assert len(bench.queue) == 1


def test_a_message_out_of_time_is_no_longer_renewed(make):
    bench = make(concurrency=1, timeout=5, ack_wait=30).start()
    bench.deliver()
    bench.begin()
    bench.clock.now += 5.1
    bench.consumer.look_after(bench.clock.now)
    bench.clock.now += 60
    bench.consumer.look_after(bench.clock.now)
    assert bench.deliveries[0].calls == []


def test_a_handler_that_is_just_ending_is_not_out_of_time(make):
    bench = make(concurrency=1, timeout=5).start()
    bench.deliver()
    job = bench.begin()
    job.delivery.ack()
    bench.clock.now += 60
    assert bench.consumer.look_after(bench.clock.now) == []


# --- the end


def test_stopping_hands_back_what_has_not_begun_and_leaves_the_rest(make):
    bench = make(concurrency=2).start()
    bench.deliver(5)
    bench.begin()
    bench.consumer.stop()

    assert [delivery.fate for delivery in bench.deliveries] == [None] + [("nak", None)] * 4
    assert bench.consumer.in_hand == 1


def test_what_is_handed_back_is_handed_back_after_the_pull_has_ended(make):
    """Otherwise the server would give it to the same pull again, and count each time."""
    bench = make(concurrency=1).start()

    class Watched(FakeDelivery):
        def nak(self, delay=None):
            bench.broker.log.append("nak")

    bench.broker.deliver(Watched())
    bench.consumer.halt()
    bench.broker.deliver(Watched())
    assert bench.broker.log == []
    bench.consumer.stop()
    assert bench.broker.log == ["stop", "nak", "nak"]


def test_no_handler_begins_once_the_worker_is_stopping(make):
    bench = make(concurrency=1).start()
    bench.deliver()
    bench.consumer.halt()
    assert bench.run() is None
    bench.consumer.stop()
    assert bench.deliveries[0].fate == ("nak", None)


def test_nothing_is_asked_for_while_stopping(make):
    bench = make(concurrency=1).start()
    bench.deliver()

    def process(delivery):
        bench.consumer.halt()

    bench.run_by(process)
    assert bench.asked_for == 1


def test_a_worker_stopped_while_it_starts_does_not_leave_a_pull_behind(make):
    bench = make()
    bench.broker.while_opening = bench.consumer.stop
    bench.start()
    assert bench.broker.log == ["stop"]
    assert bench.asked_for == 0


def test_a_server_that_is_gone_does_not_keep_a_worker_from_stopping(make, caplog):
    bench = make(concurrency=1).start()
    bench.deliver(2)
    bench.broker.consumption.stop_error = BrokerError("The server did not answer.")
    bench.consumer.stop()

    assert "stopped without the server" in caplog.text
    assert all(delivery.fate == ("nak", None) for delivery in bench.deliveries)


def test_everything_in_hand_can_be_handed_back(make):
    bench = make(concurrency=1).start()
    bench.deliver(2)
    bench.begin()
    bench.consumer.abandon()
    assert all(delivery.fate == ("nak", None) for delivery in bench.deliveries)


def test_it_is_idle_when_nothing_is_in_hand_pending_or_unsettled(make):
    bench = make(concurrency=1).start()
    nothing = ConsumerInfo(stream="s", durable="d", filter_subjects=())
    assert not bench.consumer.is_idle(), "there is no consumer yet"
    bench.broker.info = nothing
    assert bench.consumer.is_idle()
    for rest in ({"pending": 1}, {"ack_pending": 1}):
        bench.broker.info = msgspec.structs.replace(nothing, **rest)
        assert not bench.consumer.is_idle()
    bench.broker.info = nothing
    bench.deliver()
    assert not bench.consumer.is_idle()


# --- bytes


def deliver_large(bench, size):
    delivery = FakeDelivery(b"x" * size, sequence=len(bench.deliveries) + 1)
    bench.deliveries.append(delivery)
    bench.broker.deliver(delivery)


def test_fewer_large_messages_are_in_hand(make):
    bench = make(concurrency=2).start()
    for _ in range(100):
        while bench.asked_for > len(bench.deliveries):
            deliver_large(bench, module.HAND_BYTES // 16)
        assert bench.consumer.in_hand <= 16
        bench.run(0.0001)


def test_what_does_not_come_since_it_is_large_is_asked_for_as_room_is_made(make):
    bench = make(concurrency=2).start()
    for _ in range(500):
        bench.deliver_what_is_asked_for()
        bench.run(0.0001)
    bench.deliver_what_is_asked_for()
    while bench.consumer.in_hand > 4:
        bench.run(0.0001)
    before = bench.asked_for
    deliver_large(bench, module.HAND_BYTES // 4)
    deliver_large(bench, module.HAND_BYTES // 4)
    bench.consumer._spared(bench.asked_for - len(bench.deliveries))
    assert bench.consumer._coming() <= 7
    for _ in range(6):
        bench.run(0.0001)
    assert bench.asked_for > before
