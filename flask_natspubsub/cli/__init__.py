"""The commands ``flask natspubsub ...``: arguments and printing only."""

from __future__ import annotations

from . import (
    deadletters,
    doctor,
    inbox,
    outbox,
    overview,
    publishing,
    relay,
    server,
    subscribers,
    verification,
    worker,
)
from .group import natspubsub

__all__ = [
    "deadletters",
    "doctor",
    "inbox",
    "natspubsub",
    "outbox",
    "overview",
    "publishing",
    "relay",
    "server",
    "subscribers",
    "verification",
    "worker",
]
