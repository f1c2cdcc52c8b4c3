"""The application under torture: an order and its event, and a handler that notes its effect.

Everything is set by the environment, as ``FLASK_...``; see ``site.Site``. Its processes are
gunicorn, ``flask natspubsub relay`` and ``flask natspubsub worker``.
"""

from __future__ import annotations

import atexit
import itertools
import os
import random
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from flask import Flask, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import event, orm

from flask_natspubsub import MessageContext, NatsPubsub

from . import failpoints

TOPIC = "order.created"
SUBSCRIBER = "ledger"
#: A file into which a worker writes, when it ends, how many messages without an effect it had.
TICKS = "TORTURE_TICKS"

db = SQLAlchemy()


class Order(db.Model):  # type: ignore[name-defined,misc]
    """A domain row, committed together with the event of the same id."""

    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    event_id: orm.Mapped[str] = orm.mapped_column(sa.String(80), index=True)


class Effect(db.Model):  # type: ignore[name-defined,misc]
    """An effect of the handler. No constraint here keeps it from happening twice."""

    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    event_id: orm.Mapped[str] = orm.mapped_column(sa.String(80), index=True)
    subscriber: orm.Mapped[str] = orm.mapped_column(sa.String(40))
    at: orm.Mapped[float] = orm.mapped_column(sa.Double)


def create_app(config: dict[str, Any] | None = None) -> Flask:
    """Make the application, with the fail-points of the environment in it if it is a process."""
    app = Flask("torture")
    # This process must not fail because it finds a connection that it has had killed.
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 25, "pool_pre_ping": config is not None}
    app.config.from_prefixed_env()
    app.config.update(config or {})
    points = failpoints.FailPoints("") if config else failpoints.install()
    db.init_app(app)
    pubsub = app.extensions["torture"] = NatsPubsub(app, db)
    _add_views(app, pubsub)
    _add_subscriber(pubsub, points)
    if app.config["SQLALCHEMY_DATABASE_URI"].startswith("sqlite"):
        with app.app_context():
            event.listen(db.engine, "connect", _use_wal)
    return app


def place_order(pubsub: NatsPubsub, ordering_key: str | None = None) -> str:
    """Add an order and its event to the current transaction; returns the event's id."""
    receipt = pubsub.publish(TOPIC, {"total": 12}, outbox=True, ordering_key=ordering_key)
    db.session.add(Order(event_id=receipt.event_id))
    return receipt.event_id


def _add_views(app: Flask, pubsub: NatsPubsub) -> None:
    @app.post("/orders")
    def order() -> tuple[str, int]:
        number = request.args.get("number", 1, int)
        event_ids = [place_order(pubsub) for _ in range(number)]
        db.session.commit()
        return "\n".join(event_ids), 201


def _add_subscriber(pubsub: NatsPubsub, points: failpoints.FailPoints) -> None:
    slowness = float(os.environ.get("TORTURE_SLOWNESS", "0"))
    ticks = itertools.count()
    if path := os.environ.get(TICKS):
        atexit.register(lambda: Path(path).write_text(str(next(ticks))))

    @pubsub.subscriber(TOPIC, name=SUBSCRIBER)
    def ledger(message: dict[str, Any], context: MessageContext) -> None:
        if message.get("tick"):
            next(ticks)
            return
        points.reach(failpoints.BEFORE)
        if slowness:
            time.sleep(random.uniform(0, slowness))
        db.session.add(Effect(event_id=context.event_id, subscriber=SUBSCRIBER, at=time.time()))
        db.session.flush()
        points.reach(failpoints.AFTER)


def _use_wal(connection: Any, record: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
