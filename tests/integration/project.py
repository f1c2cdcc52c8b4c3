"""A small Flask project in a folder, its commands run as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

from flask_natspubsub.brokers import make_broker
from flask_natspubsub.config.settings import Settings
from tests.support.processes import TIMEOUT, Child
from tests.support.secrets import SECRET

APP = """
from flask import Flask
from flask_natspubsub import NatsPubsub

pubsub = NatsPubsub()


def create_app():
    app = Flask("shop")
    app.config["NATSPUBSUB_SUBSCRIBERS"] = ["handlers"]
    app.config.from_prefixed_env()
    pubsub.init_app(app)
    return app
"""

HANDLERS = """
import pathlib
import threading

from app import pubsub

HERE = pathlib.Path(__file__).parent
VERSION = 1


def note(*words):
    with open(HERE / "journal", "a") as journal:
        journal.write(" ".join(map(str, words)) + "\\n")


@pubsub.subscriber("job.created", backoff=[0.05], max_deliver=2)
def work(message, context):
    note("begin", message["n"])
    if message.get("fail"):
        raise ValueError("cannot do job %s" % message["n"])
    while message.get("hold") and not (HERE / "release").exists():
        threading.Event().wait(0.02)
    note("end", message["n"], VERSION)
    if message.get("then"):
        pubsub.publish("job.done", {"n": message["n"]})


@pubsub.subscriber("job.done")
def follow(message):
    note("followed", message["n"])
"""


class Project:
    """A folder with an app, and an environment of its own on the server.

    It has a token, which a server without users does not ask for; nothing that a command of
    it writes may show it.
    """

    def __init__(self, folder: Path, url: str, **settings: object) -> None:
        self.folder = folder
        self.url = url
        self.env = f"t{uuid.uuid4().hex[:12]}"
        self.settings = {"URLS": url, "ENV": self.env, "TOKEN": SECRET, **settings}
        self._started: list[Child] = []
        self.write("app.py", APP)
        self.write("handlers.py", HANDLERS)
        self._broker = None

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def environment(self) -> dict[str, str]:
        given = {
            f"FLASK_NATSPUBSUB_{key}": value if isinstance(value, str) else json.dumps(value)
            for key, value in self.settings.items()
        }
        return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **given}

    def command(self, *arguments: str, app: str = "app") -> list[str]:
        return [sys.executable, "-m", "flask", "--app", app, "natspubsub", *arguments]

    def run(
        self, *arguments: str, app: str = "app", stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        done = subprocess.run(
            self.command(*arguments, app=app),
            cwd=self.folder,
            env=self.environment(),
            input="" if stdin is None else stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert SECRET not in done.stdout + done.stderr
        return done

    def json(self, *arguments: str) -> object:
        """Run a command with --json; its stdout must be one JSON value."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def start(self, *arguments: str) -> Child:
        """Start a command that runs until it is stopped."""
        log = self.folder / f"output-{len(self._started)}.log"
        child = Child(
            self.command(*arguments), log, folder=self.folder, environment=self.environment()
        )
        self._started.append(child)
        return child

    def start_worker(self, *arguments: str) -> Child:
        return self.start("worker", *arguments)

    def close(self) -> None:
        for child in self._started:
            child.end(5)
            assert SECRET not in child.log
        if self._broker is not None:
            self._broker.close()

    # --- the test's own connection

    @property
    def names(self) -> Settings:
        config = {"NATSPUBSUB_URLS": self.url, "NATSPUBSUB_ENV": self.env}
        return Settings.from_config(config, "shop")

    @property
    def broker(self):
        if self._broker is None:
            self._broker = make_broker(self.names)
        return self._broker

    def unsettled(self, durable: str = "shop-work") -> tuple[int, int]:
        """How many messages of a consumer are pending, and delivered without an ack."""
        info = self.broker.consumer_info(self.names.stream, durable)
        return (info.pending, info.ack_pending) if info else (-1, -1)

    # --- what the handlers wrote

    def journal(self) -> list[str]:
        path = self.folder / "journal"
        return path.read_text().splitlines() if path.exists() else []

    def noted(self, word: str) -> Counter[int]:
        """How often the handlers noted ``word``, by job."""
        return Counter(int(line.split()[1]) for line in self.journal() if line.startswith(word))

    def release(self) -> None:
        """Let the handlers that hold go on."""
        (self.folder / "release").touch()
