"""The application whose worker is measured as people start it, by ``flask natspubsub worker``.

Its settings come from the environment, as those of a container do.
"""

from __future__ import annotations

import logging
import os

from flask import Flask

from flask_natspubsub import NatsPubsub

app = Flask("shop")
app.config.from_prefixed_env()
pubsub = NatsPubsub(app)
if os.environ.get("BENCH_LOG") == "off":
    logging.getLogger("flask_natspubsub").setLevel(logging.WARNING)


@pubsub.subscriber("order.created", name=os.environ["BENCH_SUBSCRIBER"])
def handle(message: dict[str, object]) -> None:
    """Do nothing."""
