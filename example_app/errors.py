"""Errors are returned as JSON with the trace id, which a customer can quote to support."""

from __future__ import annotations

from flask import Flask
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import BadRequest, HTTPException

from flask_natspubsub import current_trace_id


class InvalidInput(BadRequest):
    """The request has invalid fields.

    :param fields: the problem of each field, by its name.
    """

    description = "The request has fields that are missing or wrong."

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__()
        self.fields = fields


def init_app(app: Flask) -> None:
    """Return errors as JSON."""
    app.register_error_handler(HTTPException, http_error)


def http_error(error: HTTPException) -> ResponseReturnValue:
    """Return an HTTP error as JSON."""
    if error.code is None or error.response is not None:  # a redirect, or a complete response
        return error
    body: dict[str, object] = {"code": error.name.lower().replace(" ", "_")}
    body["message"] = error.description
    if isinstance(error, InvalidInput):
        body |= {"code": "invalid_input", "fields": error.fields}
    return {"error": body, "trace_id": current_trace_id()}, error.code
