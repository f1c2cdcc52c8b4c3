"""Fixtures that all tests share, and checks that a test leaves nothing behind."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from flask import Flask

from flask_natspubsub import NatsPubsub
from flask_natspubsub.subscribing.subscriber import collect_local_classes
from tests.support import ordinary_signals
from tests.support.secrets import SECRET
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from tests.support.databases import MysqlServer, PostgresServer

MakePubsub = Callable[..., NatsPubsub]

HERE = Path(__file__).parent
# The folders whose tests take longest, longest first. A wrong place here costs only time.
SLOW_FIRST = ("torture", "e2e", "integration")

# Python's own helper of multiprocessing's "spawn", which lives as long as the interpreter.
_ALLOWED_CHILDREN = ("multiprocessing.resource_tracker",)

# The duration of an example depends more on the load of the machine than on the code.
hypothesis.settings.register_profile(
    "shared", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared")


def pytest_configure() -> None:
    """Restore the default signal handlers, which background jobs lack, for child processes."""
    ordinary_signals.restore()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, in the random order within each folder.

    Workers steal from the end of each other's queue: at the end of the run, only short tests
    are left, so that all workers end at the same time.
    """
    items.sort(key=_slowness)


def _slowness(item: pytest.Item) -> int:
    folder = item.path.relative_to(HERE).parts[0]
    return SLOW_FIRST.index(folder) if folder in SLOW_FIRST else len(SLOW_FIRST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test whose captured log, stdout or stderr shows the secret."""
    report = yield
    shown = [title for title, text in report.sections if SECRET in text]
    if shown and report.outcome == "passed":
        report.outcome = "failed"
        report.longrepr = f"the secret of the tests is shown in: {', '.join(shown)}"
    return report


@pytest.fixture(autouse=True)
def _no_subscribers_of_other_tests() -> None:
    collect_local_classes()


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """After the last test, this process has no children."""
    yield
    eventually(lambda: not _children(), 10, "processes were left running", 0.05)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """After each test, there is no thread that was not there before."""
    before = set(threading.enumerate())

    def left() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread not in before]

    yield
    try:
        eventually(lambda: not left(), 5)
    except AssertionError:
        pytest.fail(f"threads were left running: {left()}")


def _children() -> list[str]:
    tasks = Path("/proc/self/task")  # Linux only: elsewhere, nothing is checked
    pids = [
        pid
        for task in (tasks.iterdir() if tasks.exists() else ())
        for pid in (task / "children").read_text().split()
    ]
    commands = [_command(pid) for pid in pids]
    return [
        command for command in commands if not any(name in command for name in _ALLOWED_CHILDREN)
    ]


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") or f"ended process {pid}"
    except OSError:
        return f"process {pid}"


@pytest.fixture(scope="session")
def nats_server() -> Iterator[NatsServer]:
    """A server that all tests share: no test stops it, and it holds every test's streams."""
    with NatsServer() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server that all tests share; each makes databases of its own in it."""
    from tests.support.databases import (
        PostgresServer,  # imports a driver and a server: only where they are used
    )

    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def mysql_server() -> Iterator[MysqlServer]:
    """A MariaDB or MySQL server that all tests share."""
    from tests.support.databases import MysqlServer  # as above

    if not MysqlServer.is_available():
        pytest.skip(MysqlServer.MISSING)
    with MysqlServer() as server:
        yield server


@pytest.fixture
def env() -> str:
    """An environment (first token of all subjects) that no other test uses."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture
def make_pubsub(env: str) -> Iterator[MakePubsub]:
    """Make extensions, each with an application of its own; shut down at the end.

    Keyword arguments are settings: ``make_pubsub(publish_timeout=1)``.
    """
    made = []

    def make(app_name: str = "shop", **settings: Any) -> NatsPubsub:
        app = Flask(app_name)
        app.config["NATSPUBSUB_ENV"] = env
        app.config["NATSPUBSUB_APP_NAME"] = app_name
        for key, value in settings.items():
            app.config[f"NATSPUBSUB_{key.upper()}"] = value
        pubsub = NatsPubsub(app)
        made.append((pubsub, app))  # the extension alone would not keep the application alive
        return pubsub

    yield make
    for pubsub, app in made:
        pubsub.shutdown(app)


@pytest.fixture
def pubsub(make_pubsub: MakePubsub, nats_server: NatsServer) -> NatsPubsub:
    """An extension connected to the shared server at its first use."""
    return make_pubsub(urls=nats_server.url)
