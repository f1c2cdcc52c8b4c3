"""The permissions of ``docs/_static/nats-permissions.conf``, tried: enough, and no more."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nats
import nats.errors
import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_natspubsub import BrokerError, NatsPubsub, PublishDenied
from flask_natspubsub.cli import natspubsub
from tests.support.databases import sqlite_url
from tests.support.secrets import SECRET
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

from .helpers import refusal

pytestmark = pytest.mark.real_server

CONFIG = Path(__file__).parents[2] / "docs/_static/nats-permissions.conf"
USERS = ("web", "worker", "operator")
STREAM = "production-events-stream"

MakeSite = Callable[..., NatsPubsub]


@pytest.fixture
def guarded() -> Iterator[NatsServer]:
    """An empty server with exactly the permissions that the documentation shows."""
    with pytest.MonkeyPatch.context() as patch:
        for user in USERS:
            patch.setenv(f"{user.upper()}_PASSWORD", SECRET)
        with NatsServer(CONFIG.read_text()) as server:
            yield server


@pytest.fixture
def site(guarded: NatsServer, tmp_path: Path) -> Iterator[MakeSite]:
    """Make the shop as one of the users runs it; all share a database."""
    made: list[tuple[NatsPubsub, Flask]] = []

    def make(user: str, **settings: Any) -> NatsPubsub:
        app = Flask("shop")
        app.config["SQLALCHEMY_DATABASE_URI"] = sqlite_url(tmp_path)
        given = {
            "env": "production",
            "urls": guarded.url,
            "user": user,
            "password": SECRET,
            "reply_prefix": f"_INBOX_{user}",
            "auto_setup": False,
            **settings,
        }
        app.config.update({f"NATSPUBSUB_{key.upper()}": value for key, value in given.items()})
        db = SQLAlchemy(app)
        pubsub = NatsPubsub(app, db=db)
        with app.app_context():
            db.create_all()
        made.append((pubsub, app))
        return pubsub

    yield make
    for pubsub, app in made:
        pubsub.shutdown(app)
        with app.app_context():
            app.extensions["sqlalchemy"].engine.dispose()


def command(pubsub: NatsPubsub, *arguments: str) -> Any:
    """Run a command of the shop; what it printed as JSON."""
    runner = pubsub.state().app.test_cli_runner()
    result = runner.invoke(natspubsub, [*arguments, "--json"])
    assert result.exit_code in (0, 1), result.output
    assert SECRET not in result.output
    return json.loads(result.stdout)


def denials(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "ermission" in text]


def test_each_user_can_do_its_work_and_is_denied_nothing(
    site: MakeSite, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    operator, web = site("operator"), site("web")
    worker = site("worker", backoff=[0.05], max_deliver=2)
    seen: list[tuple[str, int]] = []

    @worker.subscriber("order.>", inbox=True)
    def handle(message: dict[str, Any], context: Any) -> None:
        seen.append((context.topic, context.attempt))
        if message.get("fail"):
            raise ValueError("cannot")
        if message.get("then"):
            worker.publish("stock.changed", {})

    command(operator, "setup")
    assert [change["action"] for change in command(operator, "setup")] == ["ok", "ok"]
    web.publish("order.direct", {"then": True})
    with worker.run_worker() as running:
        publish_by_outbox(web, "order.relayed", {})
        publish_by_outbox(web, "order.failed", {"fail": True})
        eventually(lambda: len(seen) == 4, 30)
        letters = eventually(lambda: command(operator, "dlq", "list"), 30)
        assert running.is_healthy
        assert command(worker, "doctor")
    assert sorted(seen) == [
        ("order.direct", 1),
        ("order.failed", 1),
        ("order.failed", 2),
        ("order.relayed", 1),
    ]
    assert command(operator, "doctor")
    command(operator, "dlq", "replay", letters[0]["id"])
    assert command(operator, "dlq", "list") == []
    assert command(operator, "outbox", "verify")
    assert denials(caplog) == []


def publish_by_outbox(pubsub: NatsPubsub, topic: str, message: dict[str, Any]) -> None:
    app = pubsub.state().app
    with app.app_context():
        pubsub.publish(topic, message, outbox=True)
        app.extensions["sqlalchemy"].session.commit()


@pytest.mark.parametrize("user", ["web", "worker"])
def test_only_the_operator_makes_streams(site: MakeSite, user: str) -> None:
    pubsub = site(user, env="staging")
    result = pubsub.state().app.test_cli_runner().invoke(natspubsub, ["setup"])

    assert result.exit_code == 1
    assert "the server does not let this user send to it" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("verb", ["PURGE", "DELETE"])
def test_nobody_empties_or_removes_the_stream(
    site: MakeSite, guarded: NatsServer, user: str, verb: str
) -> None:
    command(site("operator"), "setup")

    with pytest.raises(nats.errors.TimeoutError):
        ask(guarded, user, f"STREAM.{verb}.{STREAM}")
    assert command(site("operator"), "setup")[0]["action"] == "ok"


@pytest.mark.parametrize("user", ["web", "worker"])
@pytest.mark.parametrize("other", [{"env": "staging"}, {"app_name": "billing"}])
def test_nobody_publishes_for_another_app(site: MakeSite, user: str, other: dict[str, str]) -> None:
    with pytest.raises(PublishDenied, match="does not let this user publish to") as caught:
        site(user, **other).publish("order.created", {})

    assert caught.value.outcome == "not_sent"
    names = {"env": "production", "app_name": "shop", **other}
    assert f"'{names['env']}.{names['app_name']}.order.created'" in str(caught.value)


def test_who_may_read_the_stream_sees_whose_message_has_an_id(site: MakeSite) -> None:
    command(site("operator"), "setup")
    web, worker = site("web"), site("worker")
    web.publish("order.first", {}, event_id="taken")

    assert web.publish("order.second", {}, event_id="taken").duplicate  # it cannot look
    assert not worker.publish("order.third", {}, event_id="taken").duplicate
    assert worker.publish("order.third", {}, event_id="taken").duplicate
    assert (web.state().broker().reads_denied, worker.state().broker().reads_denied) == (
        True,
        False,
    )


def test_a_web_process_does_not_consume(site: MakeSite) -> None:
    web = site("web")

    @web.subscriber("order.created")
    def handle(message: dict[str, Any]) -> None:
        """Never called."""

    with (
        pytest.raises(BrokerError, match=f"{STREAM}: the server does not let this user"),
        web.run_worker(),
    ):
        pass


@pytest.mark.parametrize("prefix", ["_INBOX", "_INBOX_worker"])
def test_nobody_listens_to_the_answers_of_others(site: MakeSite, prefix: str) -> None:
    pubsub = site("web", reply_prefix=prefix)

    text = refusal(pubsub)

    assert f"does not let this user listen to '{prefix}.>'" in text
    assert "NATSPUBSUB_REPLY_PREFIX" in text


def ask(server: NatsServer, user: str, verb: str) -> None:
    """Call the JetStream API as a user, by way of another client."""

    async def main() -> None:
        client = await nats.connect(
            server.url, user=user, password=SECRET, inbox_prefix=f"_INBOX_{user}", error_cb=ignore
        )
        try:
            await client.request(f"$JS.API.{verb}", b"", timeout=0.5)
        finally:
            await client.close()

    async def ignore(error: Exception) -> None:
        """Denied, as it should be."""

    asyncio.run(main())
