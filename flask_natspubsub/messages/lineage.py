"""Where a message comes from: the ids that what is published here inherits.

Kept in a context variable: set by the request hooks for a request and by the processor for
a handler, so that threads, greenlets and tasks each see their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token

import msgspec


class Lineage(msgspec.Struct, frozen=True, gc=False):
    """Ids that a published message inherits unless its publisher gives others."""

    trace_id: str | None = None
    correlation_id: str | None = None
    causation_id: str | None = None
    traceparent: str | None = None


_NONE = Lineage()
_current: ContextVar[Lineage] = ContextVar("flask_natspubsub.lineage", default=_NONE)


def current_lineage() -> Lineage:
    """Return the ids in force here; all None where nothing has set them."""
    return _current.get()


def current_trace_id() -> str | None:
    """Return the trace id of the request or message being handled; None outside of both."""
    return _current.get().trace_id


def enter(lineage: Lineage) -> Token[Lineage]:
    """Set the ids; pass the token to ``leave``."""
    return _current.set(lineage)


def leave(token: Token[Lineage]) -> None:
    """Restore what was set before ``enter``."""
    _current.reset(token)


@contextmanager
def within(lineage: Lineage) -> Iterator[None]:
    """Set the ids for a block."""
    token = enter(lineage)
    try:
        yield
    finally:
        leave(token)
