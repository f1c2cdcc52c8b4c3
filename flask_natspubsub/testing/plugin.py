"""The pytest plugin with the fixture ``pubsub_broker``. Nothing in it is autouse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flask import Flask

from .broker import TestBroker

#: Common names of a project's fixture for its application.
_NAMES = ("app", "application")


@pytest.fixture
def pubsub_app(request: pytest.FixtureRequest) -> Flask:
    """Return the project's fixture ``app`` or ``application``; override it for another name."""
    for name in _NAMES:
        try:
            found: Flask = request.getfixturevalue(name)
        except pytest.FixtureLookupError as error:
            if error.argname != name:
                raise  # the fixture exists, but one that it uses does not
        else:
            return found
    raise pytest.UsageError(
        "pubsub_broker finds no fixture 'app' or 'application'. If yours has another name, "
        "define a fixture 'pubsub_app' that returns it."
    )


@pytest.fixture
def pubsub_broker(pubsub_app: Flask) -> Iterator[TestBroker]:
    """Replace the broker of the project's application by a ``TestBroker``."""
    with TestBroker(pubsub_app) as broker:
        yield broker
