"""How long a client waits before it tries to connect again."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from flask_natspubsub.brokers.link import LONGEST_PAUSE, RETURN_WITHIN, jittered

CLIENTS = 100


@pytest.mark.parametrize(
    ("pause", "was_up"),
    [(0.05, True), (LONGEST_PAUSE, True), (LONGEST_PAUSE, False)],
    ids=["lost a moment ago", "lost again", "away for long"],
)
def test_a_hundred_clients_do_not_return_at_the_same_moment(pause: float, was_up: bool) -> None:
    random.seed(1)
    pauses = [jittered(pause, was_up=was_up) for _ in range(CLIENTS)]
    tenths = Counter(int(seconds * 10) for seconds in pauses)

    assert max(tenths.values()) <= CLIENTS * 0.2


def test_who_has_lost_the_connection_is_back_soon() -> None:
    assert RETURN_WITHIN <= 1
    assert all(0 <= jittered(0.05, was_up=True) <= RETURN_WITHIN for _ in range(1000))
