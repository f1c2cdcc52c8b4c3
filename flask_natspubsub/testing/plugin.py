"""The pytest plugin: the fixture ``pubsub_broker``. Nothing in it is autouse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flask import Flask

from .broker import TestBroker


@pytest.fixture
def pubsub_broker(app: Flask) -> Iterator[TestBroker]:
    """Put a ``TestBroker`` in place of the broker of the project's own ``app`` fixture."""
    with TestBroker(app) as broker:
        yield broker
