"""The extensions, created without an app, so that any module can import them."""

from __future__ import annotations

from typing import Any

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import DeclarativeBase

from flask_natspubsub import NatsPubsub


class Base(DeclarativeBase):
    """Base class of the models."""


db = SQLAlchemy(model_class=Base)
pubsub = NatsPubsub()


def prepare_sqlite(engine: Engine) -> None:
    """Let web and worker processes share one SQLite file; other databases need nothing."""
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _share_file)
        event.listen(engine, "savepoint", _begin_before_savepoint)


def _share_file(connection: Any, record: object) -> None:
    connection.execute("PRAGMA busy_timeout = 30000")  # first, since the next may have to wait
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_before_savepoint(connection: Connection, name: str) -> None:
    """Begin where Python's driver would not: the savepoint's release would be a commit."""
    if not connection.connection.driver_connection.in_transaction:  # type: ignore[union-attr]
        connection.exec_driver_sql("BEGIN IMMEDIATE")
