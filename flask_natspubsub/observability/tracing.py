"""The trace id of a request: taken from its headers, kept, logged and sent back.

``traceparent`` is read as W3C Trace Context level 1 defines it: https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

from flask import Flask, Response, has_request_context, request

from ..messages.lineage import Lineage, ask_requests, current_lineage, current_trace_id, within

_ALLOWED = r"[A-Za-z0-9._:/+=@-]{1,128}"
_TRACEPARENT = r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_HEADER_W3C = "HTTP_TRACEPARENT"
# In the request's own environment: ``g`` is shared by a request made inside another one. All ids
# but the one that goes back are put together when somebody asks for them.
_TRACE_ID = "flask_natspubsub.trace_id"
_LINEAGE = "flask_natspubsub.lineage"


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
    w3c = re.fullmatch(_TRACEPARENT, traceparent) if traceparent else None
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
        w3c = parent if re.fullmatch(_TRACEPARENT, parent) else None
        lineage = environ[_LINEAGE] = Lineage(environ[_TRACE_ID], traceparent=w3c)
    return lineage


ask_requests(_of_request)
