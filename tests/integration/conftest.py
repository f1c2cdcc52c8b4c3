"""Apps on the shared server, and projects whose commands run as processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakePubsub
from tests.support.secrets import SECRET
from tests.support.servers import NatsServer

from .project import Project
from .shop import Shop

MakeShop = Callable[..., Shop]


@pytest.fixture
def no_secret_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail the test if what it logs, at any level, has the secret."""
    caplog.set_level(logging.DEBUG)
    yield
    formatter = logging.Formatter("%(message)s %(args)s")
    assert SECRET not in "\n".join(formatter.format(record) for record in caplog.records)


@pytest.fixture
def make_shop(make_pubsub: MakePubsub, nats_server: NatsServer) -> Iterator[MakeShop]:
    """Make shops; keyword arguments are settings. Their workers are stopped at the end."""
    with ExitStack() as stack:

        def make(app_name: str = "shop", **settings: Any) -> Shop:
            settings = {"urls": nats_server.url, "backoff": [0.05], **settings}
            return stack.enter_context(Shop(make_pubsub(app_name, **settings)))

        yield make


@pytest.fixture
def shop(make_shop: MakeShop) -> Shop:
    """One shop on the shared server."""
    return make_shop()


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    """A server for the tests of one file, which may stop it."""
    with NatsServer() as running:
        yield running


@pytest.fixture
def project(tmp_path: Path, server: NatsServer) -> Iterator[Project]:
    """A project in a folder of its own."""
    made = Project(tmp_path, server.url)
    yield made
    made.close()
