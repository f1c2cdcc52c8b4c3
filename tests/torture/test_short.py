"""Runs every scenario in short; ``make torture`` runs them at full length."""

from __future__ import annotations

import pytest

from tests.support.databases import PostgresServer

from .run import Run, Scenario
from .scenarios import SCENARIOS

pytestmark = [
    pytest.mark.real_server,
    # Python 3.12 warns of forking with threads around, which is what ``forks`` does.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

SEED = 1
LIMIT = 120.0


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_nothing_is_lost_and_no_effect_happens_twice(
    scenario: Scenario, postgres_server: PostgresServer
) -> None:
    run = Run(scenario.name, scenario.short, SEED, lambda: postgres_server, LIMIT)
    result = scenario.function(run)
    print(result)

    assert result.problems == []
    assert result.effects >= result.committed > 0
