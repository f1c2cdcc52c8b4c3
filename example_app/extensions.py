"""The extensions, made without an app, so that any module may import them."""

from __future__ import annotations

import sqlite3
from typing import Any

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine, event
from sqlalchemy.orm import DeclarativeBase

from flask_natspubsub import NatsPubsub


class Base(DeclarativeBase):
    """What the models inherit from."""


db = SQLAlchemy(model_class=Base)
pubsub = NatsPubsub()


@event.listens_for(Engine, "connect")
def prepare_sqlite(connection: Any, record: object) -> None:
    """Let web and worker processes share one SQLite file; other databases need nothing."""
    if not isinstance(connection, sqlite3.Connection):
        return
    connection.execute("PRAGMA busy_timeout = 30000")  # first, since the next may have to wait
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
