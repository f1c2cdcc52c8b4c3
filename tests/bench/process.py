"""A worker process of the bench: works until its standard input ends."""

from __future__ import annotations

import logging
import sys

from flask import Flask

from flask_natspubsub import NatsPubsub


def main(url: str, name: str) -> None:
    logging.disable(logging.WARNING)
    app = Flask("shop")
    app.config.update(NATSPUBSUB_URLS=url, NATSPUBSUB_ENV="bench", NATSPUBSUB_CONCURRENCY=4)
    pubsub = NatsPubsub(app)

    @pubsub.subscriber("order.created", name=name)
    def handle(message: dict[str, object]) -> None:
        """Do nothing."""

    with app.app_context(), pubsub.run_worker():
        sys.stdin.read()
    pubsub.shutdown()


main(*sys.argv[1:])
