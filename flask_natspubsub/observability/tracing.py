"""Where a message comes from: the ids that what is published here inherits.

Those of a request are taken from its headers, kept with the request, logged and sent back. Those of
a handler are kept in a context variable, so threads, greenlets and tasks each see their own.

``traceparent`` is read as W3C Trace Context level 1 defines it: https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import contextvars
import logging
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import msgspec
from flask import Flask, Response, has_request_context, request

from ..messages.envelope import TRACEPARENT, Lineage

_ALLOWED = r"[A-Za-z0-9._:/+=@-]{1,128}"
_HEADER_W3C = "HTTP_TRACEPARENT"
# In the request's own environment: ``g`` is shared by a request made inside another one. All ids
# but the one that goes back are put together when somebody asks for them.
_TRACE_ID = "flask_natspubsub.trace_id"
_LINEAGE = "flask_natspubsub.lineage"


class _Entered(msgspec.Struct, frozen=True, gc=False):
    """What ``enter`` was given, and the ids of the request that it was called in."""

    lineage: Lineage
    within: Lineage | None


Token = contextvars.Token[_Entered | None]

_NONE = Lineage()
_entered: ContextVar[_Entered | None] = ContextVar("flask_natspubsub.lineage", default=None)


def current_lineage() -> Lineage:
    """Return the ids in force here; all None where nothing has set them."""
    request_ids, entered = _of_request(), _entered.get()
    # A request made inside a handler has its own; a handler run inside a request too.
    if entered is not None and (request_ids is None or request_ids is entered.within):
        return entered.lineage
    return request_ids or _NONE


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


class TraceIdFilter(logging.Filter):
    """Puts ``trace_id`` (``"-"`` where there is none) on every log record; drops none.

    Add it to a handler and write ``%(trace_id)s`` in the handler's format.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Set the attribute and let the record pass."""
        record.trace_id = current_trace_id() or "-"
        return True


def choose_trace_id(trace_header: str | None, traceparent: str | None) -> str:
    """Choose the trace id: the header's, else that of ``traceparent``, else a new one.

    A header that is longer than 128 characters, or has others than letters, digits and
    ``._:/+=@-``, is not trusted: it would end up in logs, headers and messages.
    """
    if trace_header and re.fullmatch(_ALLOWED, trace_header):
        return trace_header
    w3c = re.fullmatch(TRACEPARENT, traceparent) if traceparent else None
    return w3c[1] if w3c else random.randbytes(16).hex()  # noqa: S311 - nothing secret


class _Streamed:
    """The body of a streamed response, with the ids of its request, which is over by then."""

    def __init__(self, lineage: Lineage, parts: Iterable[Any]) -> None:
        self._lineage = lineage
        self._parts = parts
        self._iterator = iter(parts)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with within(self._lineage):
            return next(self._iterator)

    def close(self) -> None:
        with within(self._lineage):
            if hasattr(self._parts, "close"):
                self._parts.close()


def install(app: Flask, header: str) -> None:
    """Add the request hooks to ``app``.

    They run for every request, so they read what WSGI gives them, and not the objects around it:
    through the proxy each attribute takes twice as long.
    """
    key = f"HTTP_{header.upper().replace('-', '_')}"

    def before() -> None:
        environ = request._get_current_object().environ  # type: ignore[attr-defined]
        environ[_TRACE_ID] = choose_trace_id(environ.get(key), environ.get(_HEADER_W3C))

    def after(response: Response) -> Response:
        environ = request._get_current_object().environ  # type: ignore[attr-defined]
        trace_id = environ.get(_TRACE_ID)
        if trace_id is not None:
            response.headers.set(header, trace_id)
            body = response.response
            if type(body) is not list and response.is_streamed and not response.direct_passthrough:
                response.response = _Streamed(current_lineage(), body)
        return response

    app.before_request_funcs.setdefault(None, []).insert(0, before)
    app.after_request(after)


def _of_request() -> Lineage | None:
    """Return the ids of the request being handled, if there is one that went through the hooks."""
    if not has_request_context():
        return None
    environ = request.environ
    lineage: Lineage | None = environ.get(_LINEAGE)
    if lineage is None and _TRACE_ID in environ:
        parent = environ.get(_HEADER_W3C, "")
        w3c = parent if re.fullmatch(TRACEPARENT, parent) else None
        lineage = environ[_LINEAGE] = Lineage(environ[_TRACE_ID], traceparent=w3c)
    return lineage
