"""Long runs resume where they were cut off, and the docs report them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from .kept import Kept
from .ledger import Result
from .run import Scenario

SEED = 1
COMMIT = "abc"


def never(run: object) -> Result:
    raise AssertionError("not to be run")


KILLED = Scenario("killed", never, {"kills": 1}, {"kills": 20})
CUT = Scenario("cut", never, {"cuts": 1}, {"cuts": 9})


def result(**changes: object) -> Result:
    good = Result("killed", 1_000, 990, 990, 0, 0, 2.5, {"kills": 20})
    return replace(good, **changes)


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "state.json", tmp_path / "report.md"


def test_what_was_done_on_this_commit_is_known(paths: tuple[Path, Path]) -> None:
    Kept(*paths).add(KILLED, SEED, COMMIT, result(), 12.0)
    again = Kept(*paths)
    found = again.find(KILLED, SEED, COMMIT)
    assert found is not None
    assert found.outcome == result()
    assert again.find(CUT, SEED, COMMIT) is None
    assert again.find(KILLED, SEED + 1, "abc") is None
    assert again.find(replace(KILLED, long={"kills": 21}), SEED, COMMIT) is None
    assert again.find(KILLED, SEED, "def") is None


def test_what_went_wrong_or_may_be_of_other_code_is_run_again(paths: tuple[Path, Path]) -> None:
    state = Kept(*paths)
    state.add(KILLED, SEED, COMMIT, result(lost=1, problems=["1 message was lost"]), 12.0)
    assert state.find(KILLED, SEED, COMMIT) is None
    for unknown in ("abc-dirty", ""):
        state.add(KILLED, SEED, unknown, result(), 12.0)
        assert state.find(KILLED, SEED, unknown) is None


def test_the_report_tells_the_newest_result_of_each_and_what_was_not_run(
    paths: tuple[Path, Path],
) -> None:
    state = Kept(*paths)
    state.add(KILLED, SEED, COMMIT, result(lost=7, problems=["7 messages were lost"]), 12.0)
    state.write_report([KILLED, CUT])
    assert "**Wrong: 7 messages were lost**" in paths[1].read_text()
    state.add(KILLED, SEED, COMMIT, result(), 12.0)
    state.write_report([KILLED, CUT])
    text = paths[1].read_text()
    assert "| killed | 1,000 | 990 | 990 | 0 | 0 | 2.5 | 12 |" in text
    assert "| cut | not run |" in text
    assert "kills 20" in text
    assert "lost**" not in text


def test_a_run_without_counts_is_reported_as_failed(paths: tuple[Path, Path]) -> None:
    state = Kept(*paths)
    nothing = Result("killed", 0, 0, 0, 0, 0, 0.0, problems=["FAILED: TooLong"])
    state.add(KILLED, SEED, COMMIT, nothing, 12.0)
    state.write_report([KILLED])
    text = paths[1].read_text()
    assert "| killed | failed | | | | | | 12 |" in text
    assert "**Wrong: FAILED: TooLong**" in text
    assert state.find(KILLED, SEED, COMMIT) is None
