"""The circuit breaker, on a clock of its own."""

from __future__ import annotations

import pytest

from flask_natspubsub import CircuitOpen
from flask_natspubsub.publishing import breaker as module
from flask_natspubsub.publishing.breaker import CircuitBreaker
from tests.support.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def fail(breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        breaker.check()
        breaker.failure()


def test_it_opens_after_so_many_failures_in_a_row(clock: Clock) -> None:
    breaker = CircuitBreaker(3, 5.0)
    fail(breaker, 2)
    breaker.success()
    fail(breaker, 3)

    assert breaker.is_open
    with pytest.raises(CircuitOpen, match=r"3 publishes in a row failed; .* another 5\.0 s"):
        breaker.check()


def test_after_a_while_one_may_try_and_a_success_closes_it(clock: Clock) -> None:
    breaker = CircuitBreaker(1, 5.0)
    fail(breaker, 1)
    clock.now += 5.1

    breaker.check()
    with pytest.raises(CircuitOpen):
        breaker.check()
    breaker.success()

    assert not breaker.is_open
    breaker.check()


def test_a_failed_try_keeps_it_open_for_another_while(clock: Clock) -> None:
    breaker = CircuitBreaker(1, 5.0)
    fail(breaker, 1)
    clock.now += 5.1
    fail(breaker, 1)
    clock.now += 4.9

    with pytest.raises(CircuitOpen):
        breaker.check()
    clock.now += 0.2
    breaker.check()


def test_a_threshold_of_zero_never_opens(clock: Clock) -> None:
    breaker = CircuitBreaker(0, 5.0)
    fail(breaker, 100)

    assert not breaker.is_open
