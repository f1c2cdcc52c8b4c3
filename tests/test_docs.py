"""The pages are right: their examples run, their commands exist, nothing is left out."""

from __future__ import annotations

import contextlib
import gc
import re
import shlex
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import click
import pytest
from flask import Flask

import flask_natspubsub.cli
from docs.generated import commands_text, presets_text, settings_text
from flask_natspubsub import NatsPubsub, NatsPubsubError
from flask_natspubsub.app import state
from flask_natspubsub.brokers.memory.broker import MemoryBroker
from flask_natspubsub.config import settings
from flask_natspubsub.subscribing.options import OPTION_NAMES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.rst"))]
RST_BLOCK = re.compile(r"^( *)\.\. code-block:: (\w+)\n((?:\1 +:.*\n)*)\n((?:\1 +.*\n|\n)+)", re.M)
MD_BLOCK = re.compile(r"^()```(\w+)\n()(.*?)^```$", re.M | re.S)
NOT_RUN: dict[str, int] = {"operating.rst": 1}  # would patch logging for all tests
OWN_APP = {  # these work without an app context
    "README.md",
    "inbox.rst",
    "index.rst",
    "outbox.rst",
    "quickstart.rst",
}

PROGRAMS = {"curl", "export", "flask", "gunicorn", "make", "nats", "pip", "pytest"}
EXTRAS = re.compile(r"^(\w+) = \[", re.M)


def blocks(page: Path, *languages: str) -> list[str]:
    pattern = RST_BLOCK if page.suffix == ".rst" else MD_BLOCK
    return [
        textwrap.dedent(code)
        for _, language, options, code in pattern.findall(page.read_text("utf-8"))
        if language in languages and "not-run" not in options
    ]


def named(page: Path) -> str:
    return page.name


with_python = pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=named
)


@pytest.fixture
def namespace(monkeypatch, request, tmp_path):
    """A module with ``app`` and ``pubsub``, in an app context; every broker is in memory."""
    brokers: list[MemoryBroker] = []

    def make_broker(settings: settings.Settings) -> MemoryBroker:
        brokers.append(MemoryBroker())
        return brokers[-1]

    monkeypatch.setattr(state, "make_broker", make_broker)
    monkeypatch.chdir(tmp_path)  # where the databases of the pages are made
    module = types.ModuleType(f"page_{request.node.callspec.id}".replace(".", "_"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    app = Flask("shop")
    vars(module).update(app=app, pubsub=NatsPubsub(app))
    own_app = request.node.callspec.id in OWN_APP
    with contextlib.nullcontext() if own_app else app.app_context():
        yield vars(module)
    for broker in brokers:
        broker.close()
    for made in [one for one in vars(module).values() if type(one) is Flask]:
        close_databases(made)
    vars(module).clear()
    gc.collect()  # subscriber classes of the page: nobody else should meet them


def close_databases(app: Flask) -> None:
    if "sqlalchemy" in app.extensions:
        with app.app_context():
            for engine in app.extensions["sqlalchemy"].engines.values():
                engine.dispose()


@with_python
def test_the_python_of_a_page_runs_from_top_to_bottom(page, namespace):
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)


def test_the_tests_on_the_pages_pass(tmp_path):
    page = ROOT / "docs/testing.rst"
    file = tmp_path / "test_page.py"
    file.write_text("\n\n".join(blocks(page, "python")))
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def test_blocks_that_are_not_run_are_few_and_known():
    skipped = {page.name: page.read_text("utf-8").count(":class: not-run") for page in PAGES}
    assert {name: count for name, count in skipped.items() if count} == NOT_RUN


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for code in blocks(page, "console", "ini", "yaml"):
            found += [(page.name, line) for line in re.findall(r"^\$ (.+)$", code, re.M)]
            found += [
                (page.name, line) for line in re.findall(r"(?:ExecStart=|command: )(\S.+)", code)
            ]
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_the_commands_on_the_pages_exist(page, line):
    program, *words = shlex.split(line)
    program = program.rpartition("/")[2]
    if program.startswith("["):
        return  # arguments of a container's own program
    assert program in PROGRAMS
    if program == "flask" and "natspubsub" in words:
        check_command(words[words.index("natspubsub") + 1 :])
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
        assert words[0] in targets
    elif program == "pytest":
        path, _, name = words[0].partition("::")
        assert f"def {name}(" in (ROOT / path).read_text("utf-8")
    elif program == "pip":
        asked = set(re.findall(r"\[(\w+)\]", line))
        assert asked <= set(EXTRAS.findall((ROOT / "pyproject.toml").read_text("utf-8")))


def check_command(words: list[str]) -> None:
    """Let click parse the words, and do nothing."""
    command: click.Command = flask_natspubsub.cli.natspubsub
    while isinstance(command, click.Group):
        if command.invoke_without_command and (not words or words[0].startswith("-")):
            break  # a group that is a command, too
        context = click.Context(command)
        name, following, words = command.resolve_command(context, words)
        assert following is not None, name
        command = following
    command.make_context(command.name, list(words))


def test_the_command_page_has_every_command():
    usages = re.findall(r"Usage: flask natspubsub ((?:[a-z]+ )+)", commands_text())
    assert {usage.split()[0] for usage in usages} == set(flask_natspubsub.cli.natspubsub.commands)


def test_the_configuration_page_has_every_setting():
    text = settings_text()
    for name in settings.TABLE:
        entry = text.split(f".. confval:: NATSPUBSUB_{name.upper()}\n")[1]
        assert re.match(r"\n +\S.+\n\n +\*Default:\* \S.*\. \*Allowed:\* \S", entry), name
    assert set(re.findall(r"^``(\w+)``$", presets_text(), re.M)) == set(settings.PRESETS)
    assert ".. settings-table::" in (ROOT / "docs/configuration.rst").read_text("utf-8")


def error_codes(cls: type[NatsPubsubError] = NatsPubsubError) -> set[str]:
    return {cls.code}.union(*map(error_codes, cls.__subclasses__()))


def test_the_troubleshooting_page_has_every_error_code():
    page = (ROOT / "docs/errors.rst").read_text("utf-8")
    assert error_codes() - set(re.findall(r"^\.\. _([\w-]+):$", page, re.M)) == set()


def test_the_subscribing_page_has_every_option():
    page = (ROOT / "docs/subscribing.rst").read_text("utf-8")
    assert set(OPTION_NAMES) - set(re.findall(r"^   \* - ``(\w+)``$", page, re.M)) == set()


def test_project_text_has_no_long_dashes():
    assert [page.name for page in PAGES if "\N{EM DASH}" in page.read_text("utf-8")] == []
