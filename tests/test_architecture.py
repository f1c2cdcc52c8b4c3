"""The rules of the house, held by looking at the source: who imports whom, and how long."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import flask_natspubsub

HOUSE = Path(flask_natspubsub.__file__).parent
PACKAGE = HOUSE.name

# A module imports from its own group and those before it, never from those after it.
# Settings stand after messages: they check names with messages.subjects.
FLOORS = [
    ["text"],
    ["errors", "signals", "middleware"],
    ["messages"],
    ["config", "database"],
    ["brokers"],
    ["publishing", "subscribing"],
    ["outbox", "inbox", "deadletters"],
    ["inspection"],
    ["observability", "doctor"],
    ["worker"],
    ["app"],
    ["extension"],
    ["cli", "testing"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

MAY_IMPORT = {
    "nats": {"brokers/jetstream/client.py"},
    "nkeys": {"brokers/jetstream/client.py"},
    "sqlalchemy": {
        "database/",
        "outbox/",
        "inbox/",
        "app/database.py",  # puts the three together
        "publishing/changes.py",  # model events are SQLAlchemy's own
    },
    "pytest": {"testing/plugin.py"},
}
WITHOUT_FLASK = ["messages/", "brokers/", "publishing/publisher.py", "worker/processor.py"]

IMPORTS_IN_FUNCTIONS = {
    ("brokers/__init__.py", "brokers.memory.broker"): "only what NATSPUBSUB_URLS asks for",
    ("brokers/__init__.py", "brokers.jetstream.client"): "brings nats-py and asyncio",
    ("brokers/jetstream/client.py", "nkeys"): "optional dependency",
    ("brokers/loop.py", "uvloop"): "optional",
    ("publishing/publisher.py", "concurrent.futures"): "for publish_nowait only",
    ("publishing/publisher.py", "brokers.threads"): "brings asyncio; for publish_nowait only",
    ("extension.py", "publishing.coroutines"): "brings asyncio; whoever awaits has it already",
    ("extension.py", "worker.worker"): "brings asyncio",
    ("extension.py", "deadletters.reader"): "rarely used",
    ("extension.py", "publishing.changes"): "SQLAlchemy is optional",
    ("extension.py", "outbox.verification"): "rarely used",
    ("app/state.py", "app.database"): "SQLAlchemy is optional",
}

MAX_FILE_LINES = 500
MAX_MEDIAN_FUNCTION_LINES = 10
MAX_LONG_FUNCTION_LINES = 45


class Import(NamedTuple):
    """One imported module: ``brokers.base`` for our own, ``flask`` for others'."""

    source: str
    target: str
    ours: bool
    in_function: bool


def files() -> list[Path]:
    return sorted(HOUSE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(HOUSE).as_posix()


def module_of(path: Path) -> str:
    """The dotted name below the package; '' for the package itself."""
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path) for path in files()}


def imports_of(path: Path) -> Iterator[Import]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                for target, ours in targets(child, path):
                    yield Import(module_of(path), target, ours, in_function)
            else:
                yield from walk(child, in_function or isinstance(child, functions))

    yield from walk(ast.parse(path.read_text("utf-8")), in_function=False)


def targets(node: ast.Import | ast.ImportFrom, path: Path) -> Iterator[tuple[str, bool]]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, False
    elif not node.level:
        yield node.module or "", False
    else:
        folder = path.relative_to(HOUSE).parent.parts
        base = [*folder[: len(folder) - node.level + 1], *(node.module or "").split(".")]
        found = ".".join(part for part in base if part)
        for alias in node.names:
            deeper = f"{found}.{alias.name}".lstrip(".")
            yield (deeper if deeper in MODULES else found), True


IMPORTS = [(name_of(path), found) for path in files() for found in imports_of(path)]


def top(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_its_floor():
    assert {top(module) for module in MODULES} - {""} <= FLOOR.keys()


def test_imports_go_downwards_only():
    upwards = [
        f"{name} imports {found.target}"
        for name, found in IMPORTS
        if found.ours
        and found.source
        and top(found.source) != top(found.target)
        and (FLOOR.get(top(found.target), 99) >= FLOOR[top(found.source)])
    ]
    assert upwards == []


def test_the_package_imports_itself_relatively():
    absolute = [name for name, found in IMPORTS if not found.ours and top(found.target) == PACKAGE]
    assert absolute == []


def test_no_import_cycle():
    graph: dict[str, set[str]] = {}
    for _, found in IMPORTS:
        if found.ours and not found.in_function and found.target != found.source:
            graph.setdefault(found.source, set()).add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"import cycle: {' -> '.join(error.args[1])}") from None


def test_only_the_named_files_import_drivers():
    strangers = [
        f"{name} imports {found.target}"
        for name, found in IMPORTS
        if not found.ours
        and top(found.target) in MAY_IMPORT
        and not name.startswith(tuple(MAY_IMPORT[top(found.target)]))
    ]
    assert strangers == []


def test_the_core_does_not_know_flask():
    knowing = [
        name
        for name, found in IMPORTS
        if top(found.target) == "flask" and name.startswith(tuple(WITHOUT_FLASK))
    ]
    assert knowing == []


def test_imports_inside_functions_are_the_ones_with_a_reason():
    inside = {(name, found.target) for name, found in IMPORTS if found.in_function}
    assert inside == IMPORTS_IN_FUNCTIONS.keys()


def test_facts_come_from_the_read_model():
    """CLI, doctor and health ask ``inspection`` only, so that they show the same."""
    questions = {"consumer_info", "consumers", "counts", "holders", "oldest_pending_age", "rewound"}
    shows = ("cli/", "doctor/", "app/", "observability/")
    asking = [
        f"{name_of(path)} asks {node.func.attr}"
        for path in files()
        if name_of(path).startswith(shows)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in questions
    ]
    assert asking == []


def test_files_are_short():
    lengths = {name_of(path): len(path.read_text("utf-8").splitlines()) for path in files()}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_are_short():
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for path in files()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    assert statistics.median(lengths) <= MAX_MEDIAN_FUNCTION_LINES
    assert lengths[int(len(lengths) * 0.95)] <= MAX_LONG_FUNCTION_LINES
