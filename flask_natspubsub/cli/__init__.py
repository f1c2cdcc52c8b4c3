"""The commands ``flask natspubsub ...``: arguments and printing, no more."""

from __future__ import annotations

from . import deadletters, overview, publishing, server, worker
from .group import natspubsub

__all__ = ["deadletters", "natspubsub", "overview", "publishing", "server", "worker"]
