"""Who carries the messages: the port, NATS, memory."""

from __future__ import annotations

from ..config.settings import Settings
from .base import Broker


def make_broker(settings: Settings) -> Broker:
    """Make the broker that ``NATSPUBSUB_URLS`` asks for; it connects at its first use.

    :raises ConfigurationError: a file or package for the credentials is missing.
    """
    # nats-py and asyncio cost more to import than Flask itself, and a command or a site that
    # never publishes should not pay for them: the two exceptions to "no import in functions".
    if settings.urls[0].startswith("memory:"):
        from .memory.broker import MemoryBroker

        return MemoryBroker()
    from .jetstream.client import NatsBroker

    return NatsBroker(settings)
