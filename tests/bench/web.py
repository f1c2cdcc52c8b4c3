"""The site of the bench that gunicorn serves."""

from __future__ import annotations

from flask import Flask

from flask_natspubsub import NatsPubsub

MESSAGE = {"order_id": 1, "note": "x" * 150}


def make(url: str) -> Flask:
    app = Flask("web")
    app.config.update(NATSPUBSUB_URLS=url, NATSPUBSUB_ENV="web")
    pubsub = NatsPubsub(app)

    @app.get("/publish")
    def publish() -> str:
        pubsub.publish("order.created", MESSAGE)
        return "ok"

    @app.get("/nothing")
    def nothing() -> str:
        return "ok"

    return app
