"""Tests of an application without a server: ``TestBroker`` and the fixture ``pubsub_broker``."""

from __future__ import annotations

from ..worker.outcome import Outcome
from .broker import Published, TestBroker

__all__ = ["Outcome", "Published", "TestBroker"]
