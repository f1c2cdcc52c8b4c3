"""Every error leaves the shop as JSON with the trace id, to be quoted to support."""

from __future__ import annotations

from flask import Flask
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import BadRequest, HTTPException

from flask_natspubsub import current_trace_id


class InvalidInput(BadRequest):
    """The request cannot be served as it is.

    :param fields: what is wrong, by the name of the field.
    """

    description = "The request has fields that are missing or wrong."

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__()
        self.fields = fields


def init_app(app: Flask) -> None:
    """Answer errors in JSON."""
    app.register_error_handler(HTTPException, http_error)


def http_error(error: HTTPException) -> ResponseReturnValue:
    """Say what is wrong with a request, or that something is wrong with the shop."""
    if error.code is None or error.response is not None:  # a redirect, or a finished answer
        return error
    body: dict[str, object] = {"code": error.name.lower().replace(" ", "_")}
    body["message"] = error.description
    if isinstance(error, InvalidInput):
        body |= {"code": "invalid_input", "fields": error.fields}
    return {"error": body, "trace_id": current_trace_id()}, error.code
