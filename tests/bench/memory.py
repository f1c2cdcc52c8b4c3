"""Prints how much memory a process has in use, in kB: plain Flask, or with the extension."""

from __future__ import annotations

import sys
from pathlib import Path

from flask import Flask


def main(url: str, state: str) -> None:
    app = Flask("memory")
    app.config.update(NATSPUBSUB_URLS=url, NATSPUBSUB_ENV="memory")
    if state == "flask":
        _print()
        return
    from flask_natspubsub import NatsPubsub

    pubsub = NatsPubsub(app)
    with app.app_context():
        if state != "idle":
            pubsub.publish("order.created", {"n": 1})
        if state == "worker":
            pubsub.subscriber("order.created", name="one")(lambda message: None)
            with pubsub.run_worker() as worker:
                worker.wait_until_idle()
                _print()
        else:
            _print()
    pubsub.shutdown()


def _print() -> None:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


main(*sys.argv[1:])
