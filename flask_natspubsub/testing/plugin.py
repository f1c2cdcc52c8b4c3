"""The pytest plugin: the fixture ``pubsub_broker``. Nothing in it is autouse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flask import Flask

from .broker import TestBroker

#: Names that projects give to the fixture of their application.
_NAMES = ("app", "application")


@pytest.fixture
def pubsub_app(request: pytest.FixtureRequest) -> Flask:
    """Return the project's own ``app`` or ``application``; override it for any other."""
    for name in _NAMES:
        try:
            found: Flask = request.getfixturevalue(name)
        except pytest.FixtureLookupError as error:
            if error.argname != name:
                raise  # the fixture is there, and what it needs is not
        else:
            return found
    raise pytest.UsageError(
        "pubsub_broker finds no fixture 'app' or 'application'. If yours has another name, "
        "define a fixture 'pubsub_app' that returns it."
    )


@pytest.fixture
def pubsub_broker(pubsub_app: Flask) -> Iterator[TestBroker]:
    """Put a ``TestBroker`` in place of the broker of the project's application."""
    with TestBroker(pubsub_app) as broker:
        yield broker
