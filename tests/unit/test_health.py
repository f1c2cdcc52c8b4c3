"""Health: what is asked, what is answered, and what is never told."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from flask_natspubsub import NatsPubsub
from flask_natspubsub.brokers.memory.broker import MemoryBroker
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
