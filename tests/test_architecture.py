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
    ["inbox", "deadletters"],
    ["outbox"],
    ["inspection"],
    ["observability", "doctor"],
    ["worker"],
    ["app"],
    ["extension"],
    ["cli", "testing"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

MAY_IMPORT = {
    "nats": {"brokers/jetstream/client.py", "brokers/jetstream/nats_py.py"},
    "nkeys": {"brokers/jetstream/credentials.py"},
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
    ("brokers/jetstream/credentials.py", "nkeys"): "optional dependency",
    ("brokers/loop.py", "uvloop"): "optional",
    ("publishing/publisher.py", "concurrent.futures"): "for publish_nowait only",
    ("publishing/publisher.py", "brokers.threads"): "brings asyncio; for publish_nowait only",
    ("extension.py", "publishing.coroutines"): "brings asyncio; whoever awaits has it already",
    ("extension.py", "publishing.changes"): "SQLAlchemy is optional",
    ("app/state.py", "app.database"): "SQLAlchemy is optional",
    ("app/state.py", "worker.worker"): "brings asyncio",
    ("app/state.py", "worker.async_handlers"): "brings asyncio",
    ("app/state.py", "worker.duty"): "for workers only",
    ("app/state.py", "worker.processor"): "for workers and tests only",
    ("app/state.py", "deadletters.box"): "for workers and tests only",
    ("app/state.py", "deadletters.reader"): "rarely used",
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
    for_types: bool


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

    def walk(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                for target, ours in targets(child, path):
                    yield Import(module_of(path), target, ours, in_function, for_types)
            else:
                yield from walk(
                    child,
                    in_function or isinstance(child, functions),
                    for_types or is_for_types(child),
                )

    yield from walk(ast.parse(path.read_text("utf-8")), in_function=False, for_types=False)


def is_for_types(node: ast.AST) -> bool:
    """Whether it is ``if TYPE_CHECKING:``, which never runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


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
        runs = not found.in_function and not found.for_types
        if found.ours and runs and found.target != found.source:
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


def private_names(path: Path) -> Iterator[str]:
    """Names with one leading underscore that are asked of something other than ``self``."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute):
            owner, name = ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            owner, name = map(ast.unparse, node.args[:2])
            name = name.strip("'\"")
        else:
            continue
        is_private = name.startswith("_") and not name.endswith("__") and name != "_replace"
        if is_private and owner not in ("self", "cls"):
            yield f"{name_of(path)}: {owner}.{name}"


def test_one_module_touches_private_names_of_nats_py():
    """A class made from one of nats-py could reach them by ``self``: those are there, too."""
    folder = HOUSE / "brokers" / "jetstream"
    others = [path for path in folder.glob("*.py") if path.name != "nats_py.py"]
    assert [name for path in others for name in private_names(path)] == []
    bases = [
        ast.unparse(base)
        for path in others
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    ]
    assert not {"Client", "HookedClient", "Subscription", "Transport"} & set(bases)
    assert {name.rpartition(".")[2] for name in private_names(folder / "nats_py.py")} == {
        "_transport",
        "_process_info",
        "_process_op_err",
        "_io_reader",
        "_io_writer",
        "_id",
    }


def test_what_a_connection_awaits_is_awaited_with_a_deadline():
    """nats-py may never answer: a connection's coroutines are given to ``within``."""
    path = HOUSE / "brokers" / "jetstream" / "link.py"
    link = next(
        node
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "Link"
    )
    awaited = {
        ast.unparse(node.value.func)
        for node in ast.walk(link)
        if isinstance(node, ast.Await) and isinstance(node.value, ast.Call)
    }
    own = {name for name in awaited if name.startswith("self.") and name != "self._dial"}
    assert awaited - own == {
        "within",
        "asyncio.gather",  # in a coroutine given to within
        "connection.subscribe",  # the same
        "connection.unsubscribe",  # the same
        "connection.closed.wait",  # set by every way in which a connection ends
        "connection.close",  # has a deadline of its own
    }


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
