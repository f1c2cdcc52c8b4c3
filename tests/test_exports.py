"""What is public: listed on purpose, documented, cheap to import."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flask_natspubsub
import flask_natspubsub.testing

ROOT = Path(__file__).parents[1]
NOT_AT_IMPORT = {"asyncio", "nats", "nkeys", "pydantic", "sqlalchemy", "ssl", "pytest"}

PUBLIC = [
    (module, name)
    for module in (flask_natspubsub, flask_natspubsub.testing)
    for name in module.__all__
]

# Signals and proxies are objects without a docstring of their own.
WITH_DOCSTRING = [
    (module, name)
    for module, name in PUBLIC
    if inspect.isclass(vars(module)[name]) or inspect.isfunction(vars(module)[name])
]


@pytest.mark.parametrize("module", [flask_natspubsub, flask_natspubsub.testing])
def test_all_is_sorted_and_complete(module):
    imported = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert module.__all__ == sorted(module.__all__)
    assert set(module.__all__) == imported


@pytest.mark.parametrize(("module", "name"), WITH_DOCSTRING, ids=str)
def test_public_names_have_a_docstring(module, name):
    value = vars(module)[name]
    first_line = (inspect.getdoc(value) or "").split("\n")[0]
    assert first_line.endswith((".", ":")) or "; " in first_line, first_line


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=str)
def test_public_names_are_in_the_api_reference(module, name):
    reference = (ROOT / "docs/api.rst").read_text("utf-8")
    assert re.search(rf"^\.\. (auto)?\w+:: (.*\.)?{name}$", reference, re.MULTILINE)


@pytest.mark.parametrize("cls", [flask_natspubsub.NatsPubsub, flask_natspubsub.testing.TestBroker])
def test_public_methods_have_a_docstring(cls):
    bare = [
        name
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, property))
        and not inspect.getdoc(value)
    ]
    assert bare == []


def test_the_changelog_mentions_the_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert flask_natspubsub.__version__ in headings


def test_importing_is_cheap():
    code = "import flask, sys; before = set(sys.modules); import flask_natspubsub\n"
    code += "print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {module.partition(".")[0] for module in run.stdout.split()}
    assert imported & NOT_AT_IMPORT == set()
    others = imported - {"flask_natspubsub", "msgspec", "typing_extensions", "concurrent", "gc"}
    assert len(others) <= 3, f"what needs {others}?"
