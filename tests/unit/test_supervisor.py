"""The rules of the parent of worker processes, with children that are made up."""

from __future__ import annotations

import signal

import pytest

from flask_natspubsub.cli.worker import address
from flask_natspubsub.worker.processes.child import Child, exit_text
from flask_natspubsub.worker.processes.supervisor import Slot, Supervisor
from flask_natspubsub.worker.processes.vitals import Vitals

WELL = Vitals({"monitor": 0.2}, {"nats": True})


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


class FakeChild:
    """A child that ends when it is killed or, if ``polite``, when it is asked to."""

    pid = 4711

    def __init__(self, clock, polite=True):
        self.started = self.heard = clock.now
        self.vitals = WELL
        self.polite = polite
        self.code = None
        self.asked = []

    def poll(self):
        return self.code

    def listen(self):
        pass

    def close(self):
        pass

    def kill(self):
        self.code = -9

    def ask_to_end(self, *, at_once=False):
        self.asked.append(at_once)
        if self.polite:
            self.code = 0


@pytest.fixture
def children():
    """The children in the order they are started."""
    return []


@pytest.fixture
def make(clock, children):
    """Make a supervisor of made-up children."""

    def start(command):
        children.append(FakeChild(clock))
        return children[-1]

    def make(processes=1, *, start=start, **options):
        return Supervisor(
            ["worker"], processes, patience=30, silence=30, start=start, clock=clock, **options
        )

    return make


@pytest.fixture
def one(make):
    made = make()
    made.turn()
    return made


def test_deaths_wait_longer_and_longer_and_five_in_a_minute_are_too_many(clock):
    slot = Slot(1, clock)

    assert [slot.died() for _ in range(5)] == [0.2, 0.4, 0.8, 1.6, None]


def test_deaths_of_long_ago_do_not_count(clock):
    slot = Slot(1, clock)
    for _ in range(20):
        assert slot.died() is not None
        clock.now += 16


def test_one_that_was_silent_too_long_is_killed_and_replaced(one, children, clock):
    clock.now += 4
    one.turn()
    assert children[0].code is None
    for _ in range(9):
        clock.now += 3
        one.turn()

    assert children[0].code == -9
    one.turn()
    clock.now += 1
    one.turn()
    assert len(children) == 2


def test_one_that_has_not_yet_begun_may_take_longer(one, children, clock):
    children[0].vitals = None
    for _ in range(30):
        clock.now += 3
        one.turn()

    assert children[0].code is None


def test_a_parent_that_was_held_up_itself_kills_nobody(one, children, clock):
    clock.now += 600

    one.turn()

    assert children[0].code is None


def test_one_with_a_stalled_loop_is_killed(one, children, clock):
    children[0].vitals = Vitals({"monitor": 31.0}, {})

    one.turn()

    assert children[0].code == -9


def test_one_with_an_overdue_handler_ends_in_order_and_is_no_death(one, children, clock):
    children[0].vitals = Vitals({}, {}, overdue=31.0)
    one.turn()
    assert children[0].asked == [False]

    one.turn()
    one.turn()

    assert len(children) == 2
    assert one.health()[1]["process 1"]["restarts"] == 1


def test_one_that_does_not_end_in_time_is_killed(one, children, clock):
    children[0].polite = False
    one.turn(signal.SIGTERM)
    clock.now += 39
    one.turn()
    assert children[0].code is None
    clock.now += 2
    one.turn()

    assert children[0].code == -9
    one.turn()
    assert one.exit_code == 1


def test_misuse_found_by_a_child_is_not_tried_again(one, children):
    children[0].code = 2

    one.turn()

    assert one.exit_code == 2
    assert len(children) == 1


def test_one_that_ends_by_itself_is_replaced_but_not_in_a_burst(make, children):
    burst = make(burst=True)
    burst.turn()
    children[0].code = 0

    burst.turn()

    assert burst.exit_code == 0


def test_processes_that_cannot_be_started_are_a_crash_loop(make, clock):
    def refuse(command):
        raise BlockingIOError(11, "no more processes")

    failing = make(start=refuse)
    for _ in range(5):
        failing.turn()
        clock.now += 2

    assert failing.exit_code == 1


def test_health_says_who_is_not_well(one, children, clock):
    live, rows = one.health()
    assert live
    assert rows["process 1"]["status"] == "ok"

    children[0].vitals = Vitals({}, {"nats": False})
    assert one.health()[1]["process 1"]["failed"] == ["nats"]

    clock.now += 31
    live, rows = one.health()
    assert not live
    assert rows["process 1"]["failed"] == ["nats", "heartbeat"]


def test_sighup_restarts_one_after_the_other(make, children, monkeypatch):
    monkeypatch.setattr("os.isatty", lambda descriptor: False)
    two = make(2)
    two.turn()
    two.turn(signal.SIGHUP)
    assert [child.asked for child in children] == [[False], []]

    two.turn()  # the first has ended
    two.turn()  # and is replaced, so it is the turn of the second
    assert [child.asked for child in children] == [[False], [False], []]
    two.turn()
    two.turn()
    assert len(children) == 4
    assert two.exit_code is None


def test_a_second_signal_ends_all_at_once(make, children):
    two = make(2)
    two.turn()
    for child in children:
        child.polite = False
    two.turn(signal.SIGTERM)
    two.turn(signal.SIGTERM)

    assert [child.asked for child in children] == [[False, True]] * 2
    assert two.exit_code == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--processes", "2"],  # of a broker in memory
        ["--processes", "0"],
        ["--processes", "2", "--reload"],
        ["--health-port", "no"],
        ["--health-port", "65536"],
        ["--health-port", "127.0.0.1:"],
    ],
    ids=" ".join,
)
def test_misuse_of_the_options(make_pubsub, options):
    pubsub = make_pubsub(urls="memory://")
    runner = pubsub.state().app.test_cli_runner()

    assert runner.invoke(args=["natspubsub", "worker", *options]).exit_code == 2


def test_the_address_of_the_health_port():
    assert address("8081") == ("127.0.0.1", 8081)
    assert address("0.0.0.0:8081") == ("0.0.0.0", 8081)


def test_a_program_that_is_not_there_leaves_no_socket_behind():
    with pytest.raises(FileNotFoundError):
        Child(["/there/is/no/such/program"])


def test_how_a_process_ended():
    assert exit_text(3) == "ended with 3"
    assert exit_text(-9) == "was killed by SIGKILL"
    assert exit_text(-250) == "was killed by signal 250"
