"""A worker process whose handlers do what the message says; run with ``python -m``.

Usage: URL ENV FOLDER [KEY=SECONDS ...]. It writes a line to ``FOLDER/journal`` when a handler
begins and one when it ends.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from flask import Flask

from flask_natspubsub import MessageContext, NatsPubsub


def main(url: str, env: str, folder: str, *settings: str) -> None:
    journal = os.open(Path(folder, "journal"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    app = Flask("shop")
    app.config.update(NATSPUBSUB_URLS=url, NATSPUBSUB_ENV=env, NATSPUBSUB_CONCURRENCY=4)
    for setting in settings:
        key, _, seconds = setting.partition("=")
        app.config[f"NATSPUBSUB_{key}"] = float(seconds) if "." in seconds else int(seconds)
    pubsub = NatsPubsub(app)

    def note(*words: object) -> None:
        os.write(journal, (" ".join(map(str, words)) + "\n").encode())

    @pubsub.subscriber("job.created", name="mailer")
    def handle(message: dict[str, Any], context: MessageContext) -> None:
        note("begin", message["n"], context.attempt)
        if message.get("die"):
            os._exit(9)
        if message.get("hang") and context.attempt == 1:
            threading.Event().wait()
        threading.Event().wait(message.get("seconds", 0))
        note("end", message["n"], context.attempt)

    pubsub.run_worker()
    note("ready")
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
