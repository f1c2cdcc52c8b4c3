"""Health checks, what the health endpoints answer, and the blueprint that serves them.

``live`` tells whether the process works at all, and never about anything outside: a restart
would not help there. ``ready`` tells whether it can do its job now. Bodies carry no URL, no
credentials and no error text from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import msgspec
from flask import Blueprint, Response, jsonify

from ..text import get_logger

_log = get_logger("flask_natspubsub.health")

#: Whether all is well, and a row with at least ``status`` for each check.
Report = tuple[bool, Mapping[str, Mapping[str, Any]]]


class Health(msgspec.Struct, frozen=True):
    """The outcome of one check.

    :param detail: values for ``/detailed``; must not contain secrets.
    """

    ok: bool
    detail: Mapping[str, Any]


class Check(msgspec.Struct, frozen=True):
    """A named check; while a ``required`` one fails, the process is not ready."""

    name: str
    run: Callable[[], Any]
    required: bool = True

    def result(self) -> Health:
        """Run it. True, None or a dict is healthy; False or an exception is not.

        A dict is shown as detail; ``{"ok": False, ...}`` is not healthy.
        """
        try:
            answer = self.run()
        except Exception:  # noqa: BLE001 - whatever it is, it is logged
            _log.exception("the health check %r failed", self.name)
            return Health(False, {})
        if isinstance(answer, Mapping):
            return Health(bool(answer.get("ok", True)), answer)
        return Health(answer is None or bool(answer), {})


def report(checks: list[Check]) -> tuple[bool, dict[str, dict[str, Any]]]:
    """Run all checks; returns whether every required one is healthy, and a row for each."""
    results: dict[str, dict[str, Any]] = {}
    healthy = True
    for check in checks:
        started = time.perf_counter()
        health = check.result()
        healthy = healthy and (health.ok or not check.required)
        detail = {key: value for key, value in health.detail.items() if key != "ok"}
        results[check.name] = {
            "status": "ok" if health.ok else "failed",
            "required": check.required,
            "ms": round((time.perf_counter() - started) * 1000, 1),
            **detail,
        }
    return healthy, results


class Answer(NamedTuple):
    """A response of a health endpoint: the HTTP status and the JSON object."""

    code: int
    body: dict[str, Any]


#: The pages, by their paths below the prefix, with the endpoint names of the blueprint.
PAGES = {"/": "summary", "/live": "live", "/ready": "ready", "/detailed": "detailed"}
#: No answer may come from a cache.
HEADERS = {"Cache-Control": "no-store"}


def respond(page: str, live: Callable[[], bool], checks: Callable[[], Report]) -> Answer:
    """Make the answer of a page; the worker's server and the blueprint share it.

    :param page: a value of ``PAGES``.
    :param live: whether the process works at all; called for the page ``live`` only.
    :param checks: whether the process can do its job, and a row for each check, with ``status``;
        called for the other pages.
    """
    if page == "live":
        return _answer(live())
    ready, rows = checks()
    if page == "ready":
        return _answer(ready, failed=[name for name, row in rows.items() if row["status"] != "ok"])
    if page == "summary":
        return _answer(ready, checks={name: row["status"] for name, row in rows.items()})
    return _answer(ready, checks=rows)


def _answer(well: bool, **body: Any) -> Answer:
    return Answer(200 if well else 503, {"status": "ok" if well else "failed", **body})


def make_blueprint(checks: Callable[[], list[Check]]) -> Blueprint:
    """Make the blueprint with ``/``, ``/live``, ``/ready`` and ``/detailed``.

    ``checks`` is called in each request, for the app that serves it.
    """
    blueprint = Blueprint("natspubsub_health", __name__)

    def view(page: str) -> Response:
        answer = respond(page, lambda: True, lambda: report(checks()))
        response = jsonify(answer.body)
        response.status_code = answer.code
        response.headers.update(HEADERS)
        return response

    for path, page in PAGES.items():
        blueprint.add_url_rule(path, page, partial(view, page))
    return blueprint
