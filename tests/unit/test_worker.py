"""The worker's threads on a broker in memory: being alone, starting, stopping, hanging."""

from __future__ import annotations

import contextlib
import functools
import threading
from contextlib import nullcontext

import pytest

from flask_natspubsub import message_handled
from flask_natspubsub.brokers.memory.broker import MemoryBroker
from flask_natspubsub.brokers.topology import wanted_streams
from flask_natspubsub.deadletters.box import DeadLetterBox
from flask_natspubsub.deadletters.reader import DeadLetters
from flask_natspubsub.errors import BrokerError, RegistrationError
from flask_natspubsub.messages.message import Message
from flask_natspubsub.subscribing.registry import Registry
from flask_natspubsub.subscribing.subscription import choose
from flask_natspubsub.worker import duty as duty_module
from flask_natspubsub.worker.async_handlers import AsyncHandlers
from flask_natspubsub.worker.consumer import Gate
from flask_natspubsub.worker.duty import LoopDuty
from flask_natspubsub.worker.processor import Processor
from flask_natspubsub.worker.worker import Worker
from tests.support.waiting import eventually

from .worker_helpers import SETTINGS, envelope

# --- the gate


@contextlib.contextmanager
def together(gate, who):
    gate.enter(who)
    try:
        yield
    finally:
        gate.leave(who)


class Visitor:
    """A thread that enters the gate and stays until it is let go."""

    def __init__(self, gate, *, alone=False):
        self._enter = gate.alone if alone else functools.partial(together, gate)
        self.inside, self.go, self.left = threading.Event(), threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._visit)
        self.thread.start()

    def _visit(self):
        with self._enter(self):
            self.inside.set()
            self.go.wait(20)
        self.left.set()

    def leave(self):
        self.go.set()
        self.thread.join(10)
        assert self.left.is_set()


@pytest.fixture
def visit():
    visitors = []

    def visit(gate, **options):
        visitors.append(Visitor(gate, **options))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        visitor.go.set()
    for visitor in visitors:
        visitor.thread.join(10)


def test_many_are_inside_together(visit):
    gate = Gate()
    visitors = [visit(gate) for _ in range(5)]
    for visitor in visitors:
        assert visitor.inside.wait(10)


def test_one_alone_waits_for_all_to_leave_and_keeps_others_out(visit):
    gate = Gate()
    first, second = visit(gate), visit(gate)
    assert first.inside.wait(10)
    assert second.inside.wait(10)
    loner = visit(gate, alone=True)
    eventually(lambda: gate._alone is loner)
    late = visit(gate)
    first.leave()
    assert not loner.inside.wait(0.05)
    second.leave()
    assert loner.inside.wait(10)
    assert not late.inside.wait(0.05)
    loner.leave()
    assert late.inside.wait(10)


def test_two_loners_take_turns(visit):
    gate = Gate()
    one, two = visit(gate, alone=True), visit(gate, alone=True)
    eventually(lambda: one.inside.is_set() or two.inside.is_set())
    first, second = (one, two) if one.inside.is_set() else (two, one)
    assert not second.inside.wait(0.05)
    first.leave()
    assert second.inside.wait(10)


@pytest.mark.parametrize("hangs_alone", [True, False])
def test_one_that_hangs_inside_is_counted_as_gone(visit, hangs_alone):
    gate = Gate()
    hung = visit(gate, alone=hangs_alone)
    assert hung.inside.wait(10)
    other = visit(gate, alone=not hangs_alone)
    assert not other.inside.wait(0.05)
    gate.leave(hung)
    assert other.inside.wait(10)
    hung.leave()  # in the end after all: the other is not disturbed
    assert gate._alone in (None, other)
    third = visit(gate, alone=True)
    assert not third.inside.wait(0.05)
    other.leave()
    assert third.inside.wait(10)


# --- the worker


class Place:
    """A broker in memory and what workers are made of."""

    def __init__(self):
        self.broker = MemoryBroker()
        self.broker.want(wanted_streams(SETTINGS))
        self.registry = Registry()
        self.signals = []
        self._receiver = lambda sender, **arguments: None
        message_handled.connect(self._receiver)  # signals that nobody receives are not sent
        self.release = threading.Event()
        self.workers = []

    def worker(self, handler, concurrency=2, **options):
        self.registry.add(handler, "order.created", **{"name": "mailer", **options})
        return self.make(concurrency)

    def make(self, concurrency=2, **options):
        handlers, box = AsyncHandlers(), DeadLetterBox(self.broker, SETTINGS)
        processors = [
            Processor(subscription, box, nullcontext, self.emit, handlers.run)
            for subscription in self.registry.resolve(SETTINGS)
        ]
        worker = Worker(
            self.broker,
            SETTINGS,
            processors,
            self.emit,
            handlers,
            concurrency=concurrency,
            **options,
        )
        self.workers.append(worker)
        return worker

    def emit(self, signal, **arguments):
        self.signals.append(signal.name)

    def publish(self, *ids):
        messages = [Message("test.shop.order.created", envelope({"id": id}), {}) for id in ids]
        assert self.broker.submit(messages, 1).wait(5)

    @property
    def is_settled(self):
        info = self.broker.consumer_info(SETTINGS.stream, "shop-mailer")
        return info is not None and not info.pending and not info.ack_pending

    def close(self):
        self.release.set()
        for worker in self.workers:
            worker.stop()
        self.broker.close()


@pytest.fixture
def place():
    place = Place()
    yield place
    place.close()


def test_messages_are_handled_in_threads(place):
    seen = []
    place.worker(lambda message: seen.append(message["id"])).start()
    place.publish(*range(100))
    eventually(lambda: place.is_settled)
    assert sorted(seen) == list(range(100))


def test_the_time_limit_decides_only_if_the_handler_has_not_ended(place):
    """Handlers end at just about their time limit: each message has one fate."""
    outcomes = threading.Semaphore(0)
    ended = []

    def handler(message, context):
        threading.Event().wait(0.1)
        ended.append(message["id"])
        outcomes.release()

    place.worker(handler, concurrency=8, max_deliver=1, timeout=0.1, ack_wait=0.6).start()
    place.publish(*range(60))
    for _ in range(60):
        assert outcomes.acquire(timeout=20)
    eventually(lambda: place.is_settled)
    dead = [letter.original_sequence for letter in DeadLetters(place.broker, SETTINGS)]
    handled = place.signals.count("message-handled")
    assert len(dead) == len(set(dead)) == place.signals.count("message-dead-lettered")
    assert handled + len(dead) == 60


def test_a_worker_lives_on_when_every_handler_hangs(place):
    seen = []

    def handler(message):
        seen.append(message["id"])
        if message["id"] < 6:
            place.release.wait(30)

    place.worker(handler, timeout=0.2, max_deliver=1).start()
    place.publish(*range(10))
    eventually(lambda: len(seen) == 10)
    eventually(lambda: place.is_settled)
    assert len(list(DeadLetters(place.broker, SETTINGS))) == 6


def test_stopping_while_others_hang_takes_no_longer_than_their_time_limit(place):
    began = threading.Semaphore(0)

    def handler(message):
        began.release()
        place.release.wait(30)

    worker = place.worker(handler, timeout=0.2).start()
    place.publish(1, 2)
    for _ in range(2):
        assert began.acquire(timeout=10)
    eventually(lambda: worker._consumers[0].in_hand == 0)
    assert worker.stop(timeout=20)


def test_a_handler_that_does_not_end_in_time_is_reported(place):
    began = threading.Event()

    def handler(message):
        began.set()
        place.release.wait(30)

    worker = place.worker(handler).start()
    place.publish(1)
    assert began.wait(10)
    assert worker.stop(timeout=0.05) is False
    assert place.signals[-1] == "worker-stopped"


def test_stopping_while_starting_leaves_nothing_behind(place):
    """Stopped from another thread, or a signal, before all subscribers have begun."""
    second_may_begin = threading.Event()
    for name in ("one", "two", "three"):
        place.registry.add(lambda message: None, "order.created", name=name)
    worker = place.make()
    consume = place.broker.consume

    def slow(config, deliver):
        if config.durable == "shop-two":
            second_may_begin.wait(10)
        return consume(config, deliver)

    place.broker.consume = slow
    starting = threading.Thread(target=worker.start)
    starting.start()
    eventually(lambda: place.broker.consumer_info(SETTINGS.stream, "shop-one"))
    assert worker.stop()
    second_may_begin.set()
    starting.join(10)
    assert place.broker.consumer_info(SETTINGS.stream, "shop-three") is None
    for name in ("one", "two"):
        assert place.broker.consumer_info(SETTINGS.stream, f"shop-{name}").waiting == 0
    assert not [t for t in threading.enumerate() if t.name == "natspubsub-handler"]


@pytest.mark.parametrize("error", [BrokerError("no answer"), RuntimeError("unforeseen")])
def test_a_start_that_fails_is_undone(place, error):
    worker = place.worker(lambda message: None)

    def refuse(config, deliver):
        raise error

    place.broker.consume = refuse
    with pytest.raises(type(error)):
        worker.start()
    assert not worker.is_healthy
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"natspubsub-handler", "natspubsub-monitor"}


def test_an_error_in_the_monitor_is_logged_and_makes_the_worker_unhealthy(place, caplog):
    place.registry.add(lambda message: None, "order.created", name="mailer")
    worker = place.make(tick=0.05).start()
    assert worker.is_healthy
    consumer = worker._consumers[0]

    def fail(now):
        raise RuntimeError("unforeseen")

    consumer.look_after = fail
    eventually(lambda: not worker.is_healthy)
    assert "looking after the handlers failed" in caplog.text
    del consumer.look_after
    eventually(lambda: worker.is_healthy)


def test_a_fault_of_the_package_does_not_end_a_thread(place, caplog):
    worker = place.worker(lambda message: None, concurrency=1, ack_wait=0.3)
    processor = worker._consumers[0].processor
    process, faults = processor.process, [RuntimeError("a fault"), RuntimeError("another")]

    def faulty(delivery):
        if faults:
            raise faults.pop()
        return process(delivery)

    processor.process = faulty
    worker.start()
    place.publish(1, 2, 3)
    eventually(lambda: place.is_settled)
    assert place.signals.count("message-handled") == 3
    assert caplog.text.count("mailer: not processed") == 2


# --- duties


class RecordingDuty:
    """A duty that writes down what it is told."""

    is_healthy = True

    def __init__(self, name, log, outlasts_handlers=True):
        self.name, self.log, self.outlasts_handlers = name, log, outlasts_handlers
        self.idle = True

    def start(self):
        self.log.append(f"start {self.name}")

    def halt(self):
        self.log.append(f"halt {self.name}")

    def stop(self, timeout):
        assert timeout > 0
        self.log.append(f"stop {self.name}")

    def abandon(self):
        self.log.append(f"abandon {self.name}")

    def is_idle(self):
        return self.idle

    def wake(self):
        pass

    def look_after(self, now):
        return ()

    def ping(self, saw):
        saw()


def test_duties_end_in_order_around_the_last_handlers(place):
    log, began = [], threading.Event()

    def handler(message):
        began.set()
        eventually(lambda: "stop feeder" in log)
        log.append("handler ends")

    place.registry.add(handler, "order.created", name="mailer")
    relay, feeder = RecordingDuty("relay", log), RecordingDuty("feeder", log, False)
    worker = place.make(duties=[relay, feeder]).start()
    place.publish(1)
    assert began.wait(10)
    assert worker.stop()
    worker.hand_back_all()

    assert log == [
        "start relay", "start feeder", "halt feeder", "stop feeder", "handler ends",
        "halt relay", "stop relay", "abandon feeder", "abandon relay",
    ]  # fmt: skip


def test_duties_are_part_of_health_of_pings_and_of_idleness(place):
    duty = RecordingDuty("ticking", [])
    with place.make(duties=[duty]) as worker:
        seen = set()
        worker.ping(seen.add)
        assert seen == set(worker.loops) == {
            "monitor", "handler threads", "async handlers", "ticking"
        }  # fmt: skip
        assert worker.checks() == {"running": True, "nats": True, "ticking": True}
        duty.is_healthy = False
        assert not worker.is_healthy
        duty.idle = False
        stop = threading.Event()
        waiting = threading.Thread(target=worker.wait_until_idle, args=[stop])
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        duty.idle = True
        waiting.join(10)
        assert not waiting.is_alive()


def test_a_worker_without_subscribers_has_no_handler_threads(place):
    with place.make(duties=[RecordingDuty("ticking", [])]) as worker:
        assert not [t for t in threading.enumerate() if t.name == "natspubsub-handler"]
        assert worker.is_healthy


class Loop:
    """A loop that fails the first time, as by ``sys.exit()`` in a signal's receiver."""

    is_alive = True

    def __init__(self):
        self.runs, self.released = 0, False
        self.stopping = threading.Event()

    def run(self):
        self.runs += 1
        if self.runs == 1:
            raise SystemExit
        self.stopping.wait(20)

    def stop(self):
        self.stopping.set()

    def release(self):
        self.released = True

    def is_idle(self):
        return True

    def wake(self):
        pass


def test_a_loop_that_ends_by_an_error_is_started_again(caplog, monkeypatch):
    monkeypatch.setattr(duty_module, "PAUSE", 0.01)
    loop = Loop()
    duty = LoopDuty("ticker", loop)
    duty.start()
    eventually(lambda: loop.runs == 2)
    duty.stop(10)
    assert "the ticker ended in an unforeseen way" in caplog.text
    assert not [t for t in threading.enumerate() if t.name == "natspubsub-ticker"]


def test_a_loop_that_is_abandoned_gives_up_its_leases():
    loop = Loop()
    duty = LoopDuty("ticker", loop)
    duty.abandon()
    assert loop.released
    assert loop.stopping.is_set()


def test_a_loop_that_is_not_alive_does_not_answer_a_ping():
    loop, seen = Loop(), []
    loop.runs = 1
    duty = LoopDuty("ticker", loop)
    loop.is_alive = False
    duty.ping(lambda: seen.append("before"))
    duty.start()
    duty.ping(lambda: seen.append("while"))
    duty.stop(10)
    duty.ping(lambda: seen.append("after"))
    assert seen == ["before", "after"]


# --- choosing


def test_subscribers_are_chosen_by_name():
    registry = Registry()
    for name in ("one", "two"):
        registry.add(lambda message: None, "order.created", name=name)
    subscriptions = registry.resolve(SETTINGS)

    assert choose(subscriptions, None) == subscriptions
    assert choose(subscriptions, []) == subscriptions
    assert [one.name for one in choose(subscriptions, ["two"])] == ["two"]
    with pytest.raises(RegistrationError, match=r"no subscriber 'three'. Known: one, two\."):
        choose(subscriptions, ["one", "three"])
    with pytest.raises(RegistrationError, match="Known: none"):
        choose([], ["one"])
