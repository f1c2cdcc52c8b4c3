"""Tests of an application without a server: ``TestBroker`` and the fixture ``pubsub_broker``."""

from __future__ import annotations

from .broker import Published, TestBroker

__all__ = ["Published", "TestBroker"]
