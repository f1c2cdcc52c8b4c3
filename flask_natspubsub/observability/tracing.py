"""The trace id of a request: taken from its headers, kept, logged and sent back.

``traceparent`` is read as W3C Trace Context level 1 defines it: https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import logging
import re
import secrets
from contextvars import Token

from flask import Flask, Response, g, request

from ..messages.lineage import Lineage, current_trace_id, enter, leave

_ALLOWED = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)
_KEPT = "_natspubsub_lineage"


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
    w3c = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
    if trace_header and _ALLOWED.fullmatch(trace_header):
        trace_id = trace_header
    elif w3c:
        trace_id = w3c[1]
    else:
        trace_id = secrets.token_hex(16)
    return Lineage(trace_id=trace_id, traceparent=traceparent if w3c else None)


def install(app: Flask, header: str) -> None:
    """Add the request hooks to ``app``."""

    def before() -> None:
        get = request.headers.get
        token = enter(lineage_of_request(get(header), get("traceparent")))
        setattr(g, _KEPT, token)

    def after(response: Response) -> Response:
        trace_id = current_trace_id()
        if trace_id is not None:
            response.headers[header] = trace_id
        return response

    def teardown(error: BaseException | None) -> None:
        token: Token[Lineage] | None = g.pop(_KEPT, None)
        if token is not None:
            try:
                leave(token)
            except ValueError:
                # A streamed response may be torn down in another context: nothing to restore.
                enter(Lineage())

    app.before_request_funcs.setdefault(None, []).insert(0, before)
    app.after_request(after)
    app.teardown_request(teardown)
