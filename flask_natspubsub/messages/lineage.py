"""Where a message comes from: the ids that what is published here inherits.

Those of a handler are kept in a context variable, those of a request with the request, so that
threads, greenlets and tasks each see their own.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import msgspec


class Lineage(msgspec.Struct, frozen=True, gc=False):
    """Ids that a published message inherits unless its publisher gives others."""

    trace_id: str | None = None
    correlation_id: str | None = None
    causation_id: str | None = None
    traceparent: str | None = None


class _Entered(msgspec.Struct, frozen=True, gc=False):
    """What ``enter`` was given, and the ids of the request that it was called in."""

    lineage: Lineage
    within: Lineage | None


Token = contextvars.Token[_Entered | None]

_NONE = Lineage()
_entered: ContextVar[_Entered | None] = ContextVar("flask_natspubsub.lineage", default=None)


def _no_request() -> Lineage | None:
    return None


_of_request = _no_request


def ask_requests(of_request: Callable[[], Lineage | None]) -> None:
    """Have the request being handled asked for its ids; ``of_request`` gives None outside of one.

    The web framework keeps its requests in a context variable already, so nothing has to be
    set and restored for each of them.
    """
    global _of_request
    _of_request = of_request


def current_lineage() -> Lineage:
    """Return the ids in force here; all None where nothing has set them."""
    request, entered = _of_request(), _entered.get()
    # A request made inside a handler has its own; a handler run inside a request too.
    if entered is not None and (request is None or request is entered.within):
        return entered.lineage
    return request or _NONE


def current_trace_id() -> str | None:
    """Return the trace id of the request or message being handled; None outside of both."""
    return current_lineage().trace_id


def enter(lineage: Lineage) -> Token:
    """Set the ids; pass the token to ``leave``."""
    return _entered.set(_Entered(lineage, _of_request()))


def leave(token: Token) -> None:
    """Restore what was set before ``enter``."""
    _entered.reset(token)


@contextmanager
def within(lineage: Lineage) -> Iterator[None]:
    """Set the ids for a block."""
    token = enter(lineage)
    try:
        yield
    finally:
        leave(token)
