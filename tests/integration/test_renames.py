"""A subscriber gets another name, or goes: what the worker says, and what the commands do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import Result
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_natspubsub import NatsPubsub
from flask_natspubsub.cli import natspubsub
from tests.support.databases import sqlite_url
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.real_server


class Bank:
    """An app of which each start has one subscriber, under the name it has by then."""

    def __init__(self, server: NatsServer, env: str, folder: Path, name: str, inbox: bool) -> None:
        self.app = Flask("bank")
        self.app.config.update(
            SQLALCHEMY_DATABASE_URI=sqlite_url(folder),
            NATSPUBSUB_URLS=server.url,
            NATSPUBSUB_ENV=env,
            NATSPUBSUB_USE_INBOX=inbox,
        )
        self.db = db = SQLAlchemy(self.app)
        self.pubsub = NatsPubsub(self.app, db)

        class Charge(db.Model):  # type: ignore[name-defined,misc]
            id = sa.Column(sa.Integer, primary_key=True)

        @self.pubsub.subscriber("order.made", name=name)
        def charge(message: dict[str, Any]) -> None:
            db.session.add(Charge())
            if not inbox:
                db.session.commit()

        with self.app.app_context():
            db.create_all()
        self._count = sa.select(sa.func.count()).select_from(Charge)

    @property
    def charges(self) -> int:
        with self.app.app_context():
            return int(self.db.session.execute(self._count).scalar_one())

    def publish(self, count: int) -> None:
        for _ in range(count):
            self.pubsub.publish("order.made", {})

    def work(self) -> None:
        with self.pubsub.run_worker() as worker:
            worker.wait_until_idle()

    def run(self, *arguments: str) -> Result:
        return self.app.test_cli_runner().invoke(natspubsub, [*arguments])

    def close(self) -> None:
        self.pubsub.shutdown(self.app)
        with self.app.app_context():
            self.db.engine.dispose()


Start = Callable[[str], Bank]


@pytest.fixture(params=[True, False], ids=["inbox", "no inbox"])
def start(
    request: pytest.FixtureRequest, nats_server: NatsServer, env: str, tmp_path: Path
) -> Iterator[Start]:
    made: list[Bank] = []

    def begin(name: str) -> Bank:
        made.append(Bank(nats_server, env, tmp_path, name, request.param))
        return made[-1]

    yield begin
    for bank in made:
        bank.close()


def test_nothing_is_charged_twice_after_a_rename(start: Start) -> None:
    old = start("charge")
    old.publish(3)
    old.work()
    assert old.charges == 3

    new = start("charge_card")
    done = new.run("subscribers", "rename", "charge", "charge_card")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("charge is charge_card now: 0 messages wait")
    new.publish(1)
    new.work()
    assert new.charges == 4
    assert new.run("subscribers").stderr == ""


def test_the_worker_says_that_a_subscriber_begins_anew(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    old = start("charge")
    old.publish(3)
    old.work()
    new = start("charge_card")
    with caplog.at_level(logging.WARNING, "flask_natspubsub"):
        new.work()

    said = [text for text in caplog.messages if "subscribers rename" in text]
    assert len(said) == 2
    assert "'bank-charge' has no subscriber in the app 'bank' any more" in said[0]
    assert "'charge_card' is new and begins with all messages that are stored" in said[1]
    listed = new.run("subscribers")
    assert "! the consumer 'bank-charge' has no subscriber" in listed.stderr
    assert "bank-charge_card" in listed.stdout


def test_a_subscriber_that_has_begun_is_not_moved(start: Start) -> None:
    old = start("charge")
    old.publish(3)
    old.work()
    new = start("charge_card")
    new.work()
    refused = new.run("subscribers", "rename", "charge", "charge_card")
    assert refused.exit_code == 1
    assert "has begun already" in refused.stderr
    assert "subscribers delete charge_card" in refused.stderr


def test_the_position_of_a_removed_subscriber_is_deleted_after_a_question(start: Start) -> None:
    old = start("charge")
    old.publish(1)
    old.work()
    old.publish(2)
    new = start("another")

    asked = new.app.test_cli_runner().invoke(
        natspubsub, ["subscribers", "delete", "charge"], input="n\n"
    )
    assert "2 messages wait for 'charge'. Delete it?" in asked.stderr
    assert asked.exit_code == 1
    deleted = new.run("subscribers", "delete", "charge", "--yes")
    assert deleted.stdout == "deleted bank-charge; 2 messages are not handled by it\n"
    assert new.run("subscribers", "delete", "charge", "--yes").exit_code == 1


def test_while_a_worker_pulls_nothing_is_renamed_or_deleted(start: Start) -> None:
    old = start("charge")
    new = start("charge_card")
    with old.pubsub.run_worker() as worker:
        eventually(lambda: worker.is_healthy, 10)
        old.publish(1)
        worker.wait_until_idle()
        for arguments in (("rename", "charge", "charge_card"), ("delete", "charge", "--yes")):
            refused = new.run("subscribers", *arguments)
            assert refused.exit_code == 1
            assert "A worker is pulling for the subscriber 'charge'. Stop it" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rename", "old", "nobody"), "has no subscriber 'nobody'. It has: charge."),
        (("rename", "charge", "charge"), "it was not renamed"),
        (("rename", "old", "charge"), "no consumer of a subscriber 'old'"),
    ],
)
def test_what_cannot_be_renamed(start: Start, arguments: tuple[str, ...], said: str) -> None:
    bank = start("charge")
    bank.publish(1)
    refused = bank.run("subscribers", *arguments)
    assert refused.exit_code in (1, 2)
    assert said in refused.stderr
