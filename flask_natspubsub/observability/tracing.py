"""The trace id of a request: taken from its headers, kept, logged and sent back.

``traceparent`` is read as W3C Trace Context level 1 defines it: https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterable, Iterator
from contextvars import Token
from typing import Any

from flask import Flask, Response, request

from ..messages.lineage import (
    Lineage,
    current_lineage,
    current_trace_id,
    enter,
    leave,
    within,
)

_ALLOWED = r"[A-Za-z0-9._:/+=@-]{1,128}"
_TRACEPARENT = r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
# In the request's own environment: ``g`` is shared by a request made inside another one.
_KEPT = "flask_natspubsub.lineage"


class TraceIdFilter(logging.Filter):
    """Puts ``trace_id`` (``"-"`` where there is none) on every log record; drops none.

    Add it to a handler and write ``%(trace_id)s`` in the handler's format.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Set the attribute and let the record pass."""
        record.trace_id = current_trace_id() or "-"
        return True


def lineage_of_request(trace_header: str | None, traceparent: str | None) -> Lineage:
    """Choose the trace id: the header's, else that of ``traceparent``, else a new one.

    A header that is longer than 128 characters, or has others than letters, digits and
    ``._:/+=@-``, is not trusted: it would end up in logs, headers and messages.
    """
    if not trace_header and not traceparent:
        return Lineage(f"{random.getrandbits(128):032x}")
    w3c = re.fullmatch(_TRACEPARENT, traceparent) if traceparent else None
    if trace_header and re.fullmatch(_ALLOWED, trace_header):
        trace_id = trace_header
    elif w3c:
        trace_id = w3c[1]
    else:
        trace_id = f"{random.getrandbits(128):032x}"
    return Lineage(trace_id=trace_id, traceparent=traceparent if w3c else None)


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

    They run for every request, so they read what WSGI gives them, and not the objects around it.
    """
    key = f"HTTP_{header.upper().replace('-', '_')}"

    def before() -> None:
        environ = request.environ
        own = lineage_of_request(environ.get(key), environ.get("HTTP_TRACEPARENT"))
        environ[_KEPT] = enter(own)

    def after(response: Response) -> Response:
        lineage = current_lineage()
        if lineage.trace_id is not None:
            response.headers.set(header, lineage.trace_id)
            body = response.response
            if type(body) is not list and response.is_streamed and not response.direct_passthrough:
                response.response = _Streamed(lineage, body)
        return response

    def teardown(error: BaseException | None) -> None:
        token: Token[Lineage] | None = request.environ.pop(_KEPT, None)
        if token is not None:
            try:
                leave(token)
            except ValueError:
                # A streamed response may be torn down in another context: nothing to restore.
                enter(Lineage())

    app.before_request_funcs.setdefault(None, []).insert(0, before)
    app.after_request(after)
    app.teardown_request(teardown)
