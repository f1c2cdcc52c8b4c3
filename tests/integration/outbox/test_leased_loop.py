"""Work under a lease: one of several loops leads, the others stand by."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from flask_natspubsub.database.leased_loop import LeasedLoop
from flask_natspubsub.database.leases import Leases
from flask_natspubsub.errors import DatabaseError
from tests.support.waiting import eventually

from .shop import OutboxShop


class Ticker(LeasedLoop):
    """Counts its rounds while it leads."""

    complaint = "the ticker cannot tick: %s"
    unforeseen = "the ticker failed in an unforeseen way"

    def __init__(self, leases: Leases) -> None:
        super().__init__(leases, ["ticker"])
        self.ticks = 0
        self.errors: list[Exception] = []
        self.woken: list[bool] = []

    def work(self, woken: bool) -> None:
        if self.errors:
            raise self.errors.pop()
        self.woken.append(woken)
        self.ticks += self.holds("ticker")

    def next_due(self) -> float:
        return math.inf

    def is_idle(self) -> bool:
        return True


@pytest.fixture
def leases(sqlite_shop: OutboxShop) -> Leases:
    store = sqlite_shop.store
    return Leases(store.database, store.leases.table, 1.0)


@contextmanager
def running(loop: LeasedLoop) -> Iterator[None]:
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield
    finally:
        loop.stop()
        thread.join(20)
        assert not thread.is_alive()


def test_one_leads_and_another_takes_over_when_it_stops(leases: Leases) -> None:
    first, second = Ticker(leases), Ticker(leases)
    with ExitStack() as seconds_life:
        with running(first):
            eventually(lambda: first.ticks)
            seconds_life.enter_context(running(second))
            eventually(lambda: second.has_tried)
            assert second.ticks == 0
            assert first.is_alive
        assert not first.is_alive
        assert not first.holds("ticker")
        eventually(lambda: second.ticks)
    assert [one["owner"] for one in leases.holders() if one["seconds_left"] > 0] == []


def test_one_that_does_not_renew_is_succeeded_and_notices(leases: Leases) -> None:
    first, second = Ticker(leases), Ticker(leases)
    first.turn()
    assert second.turn() > 0
    assert (first.ticks, second.ticks) == (1, 0)
    eventually(lambda: (second.turn(), second.ticks)[1])
    first.turn()
    assert (first.ticks, first.lease_lost) == (1, 1)
    second.release()


def test_a_wake_up_reaches_the_one_that_leads(leases: Leases) -> None:
    first, second = Ticker(leases), Ticker(leases)
    for loop in (first, second):
        loop.turn()
        loop.wake()
        loop.turn()
    assert (first.woken, second.woken) == ([False, True], [False, False])
    first.release()


def test_a_round_that_fails_is_logged_and_followed_by_a_pause(
    leases: Leases, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Ticker(leases)
    loop.pause = 0.01
    loop.errors = [DatabaseError("gone"), DatabaseError("gone again"), RuntimeError("a fault")]
    for _ in range(3):
        assert loop.turn() == 0
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "the ticker failed in an unforeseen way",
        "the ticker cannot tick: gone again",  # and not the next one, so soon after it
    ]
    assert 0 < loop.turn() < 1
    assert loop.ticks == 1
    loop.release()
