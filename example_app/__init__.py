"""A shop: orders arrive over HTTP, and subscribers reserve stock, confirm and keep a trail.

Start reading at ``new_order`` in ``views.py``, then go to ``events.py`` and ``subscribers.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from flask import Flask

from . import commands, errors
from .extensions import db, prepare_sqlite, pubsub
from .views import shop


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Create the application.

    :param config: overrides ``FLASK_*`` environment variables, which override the defaults.
    """
    app = Flask(__name__)
    app.config.from_mapping(
        SQLALCHEMY_DATABASE_URI=os.environ.get("DATABASE_URL", "sqlite:///shop.db"),
        NATSPUBSUB_APP_NAME="shop",
        NATSPUBSUB_SUBSCRIBERS=["example_app.subscribers"],
        NATSPUBSUB_USE_OUTBOX=True,
        NATSPUBSUB_USE_INBOX=True,
        NATSPUBSUB_HEALTH_URL_PREFIX="/health",
    )
    app.config.from_prefixed_env()
    app.config.from_mapping(config or {})

    db.init_app(app)
    with app.app_context():
        prepare_sqlite(db.engine)
    pubsub.init_app(app, db=db)
    commands.init_app(app)
    errors.init_app(app)
    app.register_blueprint(shop)
    return app
