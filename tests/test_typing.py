"""The types are right from a user's side: ``tests/typing`` passes ``mypy --strict``."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
api = pytest.importorskip("mypy.api", reason="mypy is in the dependency group 'lint'")


def test_mypy_agrees_with_a_users_code(monkeypatch):
    monkeypatch.chdir(ROOT)
    report, errors, status = api.run(["--strict", "tests/typing"])
    assert status == 0, report + errors
