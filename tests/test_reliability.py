"""The tables of faults name tests and scenarios that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.torture.scenarios import SCENARIOS

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "reliability").glob("*.md"))
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
SCENARIO_LIST = re.compile(r"scenarios? ((?:`[\w-]+`(?:, | and )?)+)")


def rows(page: Path) -> list[str]:
    lines = page.read_text().splitlines()
    return [one for one in lines if one.startswith("| ") and not one.startswith("| Fault ")]


@cache
def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {one.name for one in ast.walk(tree) if isinstance(one, FUNCTION)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_test_that_is_named_exists(page: Path) -> None:
    named = TEST.findall(page.read_text())
    assert len(named) > 20
    for path, name in named:
        assert name in functions(path), f"{path} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_scenario_that_is_named_exists(page: Path) -> None:
    known = {scenario.name for scenario in SCENARIOS}
    named = re.findall(r"`([\w-]+)`", " ".join(SCENARIO_LIST.findall(page.read_text())))
    assert named
    assert set(named) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_row_has_a_test_or_says_why_not(page: Path) -> None:
    for row in rows(page):
        _, what, test, figure = (cell.strip() for cell in row.strip("| \n").split(" | "))
        shown = "::" in test or "scenario" in test
        reason = re.search(r"[Nn]ot there yet|not apply|No test|Documented", f"{what} {test}")
        assert shown or reason, row
        assert figure
