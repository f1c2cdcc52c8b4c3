"""What is public: listed on purpose, documented, cheap to import."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

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
    if inspect.isclass(getattr(module, name)) or inspect.isfunction(getattr(module, name))
]


@pytest.mark.parametrize("module", [flask_natspubsub, flask_natspubsub.testing])
def test_all_is_sorted_and_complete(module):
    imported = {
        name
        for name, value in vars(module).items()
        if not (name.startswith("_") or inspect.ismodule(value))
        and name not in ("TYPE_CHECKING", "annotations")
    }
    assert module.__all__ == sorted(module.__all__)
    assert set(module.__all__) == imported


@pytest.mark.parametrize(("module", "name"), WITH_DOCSTRING, ids=str)
def test_public_names_have_a_docstring(module, name):
    value = getattr(module, name)
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


class Names(dict[str, Any]):
    """Names in annotations that are imported for type checkers only."""

    def __missing__(self, name: str) -> Any:
        if name in PUBLIC_NAMES:
            return getattr(flask_natspubsub, name)
        raise KeyError(name)


PUBLIC_NAMES = {name for _, name in PUBLIC}

METHODS = [
    (cls, name)
    for cls in (getattr(module, name) for module, name in PUBLIC)
    if inspect.isclass(cls)
    for name, value in vars(cls).items()
    if not name.startswith("_")
    and (inspect.isfunction(value) or isinstance(value, property))
    and name not in ("state", "declarations")  # for the package's own use
]


def returned(cls: type, name: str) -> set[Any]:
    """The classes in the return annotation of a method or property."""
    value = vars(cls)[name]
    function = value.fget if isinstance(value, property) else value
    annotation = inspect.signature(function).return_annotation
    names = Names(vars(sys.modules[cls.__module__]), Future=Future)
    hint = eval(annotation, {}, names)

    def parts(hint: Any) -> Iterator[Any]:
        yield hint
        for one in typing.get_args(hint):
            yield from parts(one) if not isinstance(one, list) else ()

    return {one for one in parts(hint) if inspect.isclass(one)}


@pytest.mark.parametrize(
    ("cls", "name"), METHODS, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_what_public_methods_return_can_be_imported_from_the_top(cls, name):
    ours = {one for one in returned(cls, name) if one.__module__.startswith("flask_natspubsub")}
    assert {one.__name__ for one in ours} <= PUBLIC_NAMES


def test_what_is_imported_late_is_listed_and_a_typo_is_an_attribute_error():
    assert set(flask_natspubsub.__all__) <= set(dir(flask_natspubsub))
    with pytest.raises(
        AttributeError, match=r"module 'flask_natspubsub' has no attribute 'Wroker'"
    ):
        flask_natspubsub.Wroker  # noqa: B018


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
