"""The commands ``flask natspubsub ...``: arguments and printing, no more."""

from __future__ import annotations

from . import deadletters, inbox, outbox, overview, publishing, relay, server, worker
from .group import natspubsub

__all__ = [
    "deadletters",
    "inbox",
    "natspubsub",
    "outbox",
    "overview",
    "publishing",
    "relay",
    "server",
    "worker",
]
