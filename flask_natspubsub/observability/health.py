"""Health checks, and the blueprint that serves them.

``live`` asks whether the process works at all, and never about anything outside: a restart
would not help there. ``ready`` asks whether it can do its job now. Bodies carry no URL, no
credentials and no error text from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from flask import Blueprint, Response, jsonify

from ..text import get_logger

_log = get_logger("flask_natspubsub.health")


class Health(msgspec.Struct, frozen=True):
    """The outcome of one check.

    :param detail: values for ``/detailed``; must not contain secrets.
    """

    ok: bool
    detail: Mapping[str, Any]


class Check(msgspec.Struct, frozen=True):
    """A named check; one that is ``required`` makes the whole not ready when it fails."""

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
    """Run all checks; returns whether every required one is healthy, and each one's outcome."""
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


def make_blueprint(checks: Callable[[], list[Check]]) -> Blueprint:
    """Make the blueprint with ``/``, ``/live``, ``/ready`` and ``/detailed``.

    ``checks`` is called in each request, for the app that serves it.
    """
    blueprint = Blueprint("natspubsub_health", __name__)

    def respond(healthy: bool, **body: Any) -> Response:
        response = jsonify(status="ok" if healthy else "failed", **body)
        response.status_code = 200 if healthy else 503
        response.headers["Cache-Control"] = "no-store"
        return response

    @blueprint.get("/")
    def summary() -> Response:
        healthy, results = report(checks())
        return respond(healthy, checks={name: row["status"] for name, row in results.items()})

    @blueprint.get("/live")
    def live() -> Response:
        return respond(True)

    @blueprint.get("/ready")
    def ready() -> Response:
        healthy, results = report(checks())
        failed = [name for name, row in results.items() if row["status"] == "failed"]
        return respond(healthy, failed=failed)

    @blueprint.get("/detailed")
    def detailed() -> Response:
        healthy, results = report(checks())
        return respond(healthy, checks=results)

    return blueprint
