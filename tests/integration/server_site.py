"""The application that the server matrix runs under real web servers."""

from __future__ import annotations

import os
import threading

from flask import Flask

from flask_natspubsub import NatsPubsub

app = Flask("shop")
app.config.from_prefixed_env()
pubsub = NatsPubsub(app)
if os.environ.get("PUBLISH_AT_IMPORT"):
    pubsub.publish("started", {}, event_id="master")


@app.post("/<event_id>")
def publish(event_id: str) -> str:
    """Publish one event, and say which process has done so."""
    pubsub.publish("a", {}, event_id=event_id)
    return str(os.getpid())


@app.post("/async/<event_id>")
async def publish_in_async_view(event_id: str) -> str:
    """Publish with an event loop running in this thread."""
    pubsub.publish("a", {}, event_id=event_id)
    return threading.current_thread().name


@app.get("/")
def ready() -> str:
    """Answer without having touched NATS."""
    return str(os.getpid())
