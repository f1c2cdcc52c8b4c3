"""Health: what is asked, what is answered, and what is never told."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from flask import Flask
from flask.testing import FlaskClient

from flask_natspubsub import NatsPubsub
from flask_natspubsub.brokers.memory.broker import MemoryBroker
from flask_natspubsub.worker.processes.health_server import HealthServer
from tests.conftest import MakePubsub

PATHS = ["/health/", "/health/live", "/health/ready", "/health/detailed"]


@pytest.fixture
def pubsub(make_pubsub: MakePubsub) -> NatsPubsub:
    return make_pubsub(
        urls="memory://", env="test", health_url_prefix="/health", password="s3cr3t", user="u"
    )


@pytest.fixture
def http(pubsub: NatsPubsub) -> FlaskClient:
    return pubsub.state().app.test_client()


def disconnect(pubsub: NatsPubsub) -> MemoryBroker:
    broker = pubsub.state().broker()
    assert isinstance(broker, MemoryBroker)
    broker.disconnect()
    return broker


def test_all_is_well(http: FlaskClient) -> None:
    assert http.get("/health/").json == {"status": "ok", "checks": {"nats": "ok"}}
    assert http.get("/health/live").json == {"status": "ok"}
    assert http.get("/health/ready").json == {"status": "ok", "failed": []}
    (check,) = http.get("/health/detailed").json["checks"].items()
    assert check[0] == "nats"
    assert check[1].keys() == {"status", "required", "ms"}
    assert (check[1]["status"], check[1]["required"]) == ("ok", True)


def test_without_a_prefix_there_are_no_routes(make_pubsub: MakePubsub) -> None:
    app = make_pubsub(urls="memory://").state().app

    assert app.test_client().get("/health/live").status_code == 404


def test_the_blueprint_can_be_registered_by_hand(make_pubsub: MakePubsub) -> None:
    pubsub = make_pubsub(urls="memory://")
    pubsub.state().app.register_blueprint(pubsub.health_blueprint, url_prefix="/up")

    assert pubsub.state().app.test_client().get("/up/ready").status_code == 200


def test_a_lost_connection_is_not_ready_but_alive(pubsub: NatsPubsub, http: FlaskClient) -> None:
    broker = disconnect(pubsub)

    assert [http.get(path).status_code for path in PATHS] == [503, 200, 503, 503]
    assert http.get("/health/ready").json == {"status": "failed", "failed": ["nats"]}
    broker.reconnect()
    assert [http.get(path).status_code for path in PATHS] == [200] * 4


@pytest.mark.parametrize("path", PATHS)
def test_answers_are_not_cached(http: FlaskClient, path: str) -> None:
    assert http.get(path).headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("answer", "healthy"),
    [
        (True, True),
        (None, True),
        ({}, True),
        ({"rows": 3}, True),
        ({"ok": True, "rows": 3}, True),
        (1, True),
        (False, False),
        ({"ok": False, "rows": 3}, False),
    ],
)
def test_a_check_of_the_user(
    pubsub: NatsPubsub, http: FlaskClient, answer: Any, healthy: bool
) -> None:
    @pubsub.health_check("database")
    def check() -> Any:
        return answer

    assert http.get("/health/ready").status_code == (200 if healthy else 503)
    row = http.get("/health/detailed").json["checks"]["database"]
    assert row["status"] == ("ok" if healthy else "failed")
    assert "ok" not in row
    if isinstance(answer, dict) and "rows" in answer:
        assert row["rows"] == 3
        assert "rows" not in http.get("/health/").text


def test_a_check_that_raises_has_failed_and_its_text_stays_in_the_log(
    pubsub: NatsPubsub, http: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    @pubsub.health_check("database")
    def check() -> None:
        raise ConnectionError("postgres://u:s3cr3t@db is down")

    for path in PATHS:
        assert "s3cr3t" not in http.get(path).text
    assert http.get("/health/ready").json["failed"] == ["database"]
    assert "the health check 'database' failed" in caplog.text
    assert caplog.records[0].levelno == logging.ERROR


def test_a_check_that_is_not_required_does_not_make_the_rest_unready(
    pubsub: NatsPubsub, http: FlaskClient
) -> None:
    @pubsub.health_check("mail", required=False)
    def check() -> bool:
        return False

    assert http.get("/health/ready").status_code == 200
    assert http.get("/health/").json == {"status": "ok", "checks": {"nats": "ok", "mail": "failed"}}


def test_checks_run_in_the_context_of_the_app_that_is_asked(make_pubsub: MakePubsub) -> None:
    pubsub = make_pubsub("one", urls="memory://", health_url_prefix="/health")
    one, two = pubsub.state().app, Flask("two")
    two.config |= {"NATSPUBSUB_URLS": "memory://", "NATSPUBSUB_HEALTH_URL_PREFIX": "/health"}
    pubsub.init_app(two)
    with one.app_context():
        disconnect(pubsub)

    assert one.test_client().get("/health/ready").status_code == 503
    assert two.test_client().get("/health/ready").status_code == 200


def test_nothing_secret_is_told(pubsub: NatsPubsub, http: FlaskClient) -> None:
    disconnect(pubsub)

    for path in PATHS:
        text = http.get(path).text
        assert "s3cr3t" not in text
        assert "memory://" not in text


# --- the worker's own server


@pytest.fixture
def rows() -> dict[str, dict[str, Any]]:
    return {"nats": {"status": "ok"}, "relay": {"status": "ok", "age": 1.5}}


@pytest.fixture
def served(rows: dict[str, dict[str, Any]]) -> Iterator[HealthServer]:
    """A health server of a process that lives while it has a row ``nats``."""
    with HealthServer("127.0.0.1", 0, lambda: ("nats" in rows, rows)) as server:
        yield server


def ask(server: HealthServer, path: str) -> tuple[int, Any]:
    url = server.url.removesuffix("/health/") + path
    try:
        with urlopen(url, timeout=10) as response:
            assert response.headers["Cache-Control"] == "no-store"
            return response.status, json.load(response)
    except HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_the_worker_answers_like_the_blueprint(
    served: HealthServer, rows: dict[str, dict[str, Any]]
) -> None:
    statuses = {"nats": "ok", "relay": "ok"}
    for summary in ("/health", "/health/", "/health/?verbose"):
        assert ask(served, summary) == (200, {"status": "ok", "checks": statuses})
    assert ask(served, "/health/live") == (200, {"status": "ok"})
    assert ask(served, "/health/ready/") == (200, {"status": "ok", "failed": []})
    assert ask(served, "/health/detailed") == (200, {"status": "ok", "checks": rows})
    for unknown in ("/", "/live", "/healthy", "/health/payloads", "/health/live/more"):
        assert ask(served, unknown)[0] == 404


def test_a_failed_check_of_the_worker_is_not_ready_but_alive(
    served: HealthServer, rows: dict[str, dict[str, Any]]
) -> None:
    rows["relay"]["status"] = "failed"
    assert [ask(served, path)[0] for path in PATHS] == [503, 200, 503, 503]
    assert ask(served, "/health/ready")[1] == {"status": "failed", "failed": ["relay"]}
    del rows["nats"]
    assert ask(served, "/health/live") == (503, {"status": "failed"})


def test_stuck_clients_do_not_keep_the_worker_from_answering(served: HealthServer) -> None:
    host, port = served.url.split("/")[2].split(":")
    with ExitStack() as stuck:
        for _ in range(50):
            client = stuck.enter_context(socket.create_connection((host, int(port)), 10))
            client.sendall(b"GET /health/li")
        assert ask(served, "/health/live") == (200, {"status": "ok"})
