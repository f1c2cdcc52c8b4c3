"""Follows one message through the package: which functions of which files it crosses.

``python -m tests.support.journey`` prints the way of a message that a view writes to the outbox,
the relay sends and a handler gets, on a real nats-server and SQLite.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

import flask_natspubsub
from flask_natspubsub import MessageContext, NatsPubsub

from .databases import sqlite_url
from .servers import NatsServer
from .waiting import eventually

HOUSE = f"{Path(flask_natspubsub.__file__).parent}/"
#: Looks, at ``eventually``'s interval, between which nothing is added when all is done.
QUIET = 10
#: What goes on by the clock, whether there is a message or not.
BY_THE_CLOCK = {"PublishWindow._sweep", "Pull._look", "ReplyWriter._look_again"}


class Call(NamedTuple):
    """One call of a function of the package."""

    thread: str
    file: str
    function: str


class Journey(list[Call]):
    """The calls that one message causes, in order."""

    @property
    def files(self) -> list[str]:
        """The files that are crossed, in the order of the first time."""
        return list(dict.fromkeys(call.file for call in self))

    @property
    def moves(self) -> int:
        """How often the file changes, within each thread."""
        threads = {call.thread for call in self}
        return sum(self._moves_of(thread) for thread in threads)

    def _moves_of(self, thread: str) -> int:
        files = [call.file for call in self if call.thread == thread]
        return sum(one != other for one, other in itertools.pairwise(files))


@contextmanager
def traced(journey: Journey) -> Iterator[None]:
    """Add to ``journey`` every call within; for threads that ``watched`` has started too."""
    _journeys.append(journey)
    try:
        yield
    finally:
        _journeys[:] = [one for one in _journeys if one is not journey]


_journeys: list[Journey] = []


def _note(frame: FrameType, event: str, argument: object) -> None:
    code = frame.f_code
    if event != "call" or not _journeys or not code.co_filename.startswith(HOUSE):
        return
    caller: FrameType | None = frame
    while caller is not None:
        if caller.f_code.co_qualname in BY_THE_CLOCK:
            return
        caller = caller.f_back
    thread = threading.current_thread().name
    if "monitor" in thread:
        return
    call = Call(thread, code.co_filename.removeprefix(HOUSE), code.co_qualname)
    for journey in list(_journeys):
        journey.append(call)


@contextmanager
def watched() -> Iterator[None]:
    """Have calls noted, in this thread and in those that are started within."""
    before = sys.getprofile()
    threading.setprofile(_note)
    sys.setprofile(_note)
    try:
        yield
    finally:
        sys.setprofile(before)
        threading.setprofile(None)  # type: ignore[arg-type]  # as its documentation says


class Site:
    """A site with a relay and a worker that follows its own messages."""

    def __init__(self, server: NatsServer, folder: Path) -> None:
        app = Flask("shop")
        app.config.update(
            NATSPUBSUB_URLS=server.url,
            NATSPUBSUB_ENV="journey",
            NATSPUBSUB_USE_INBOX=True,
            NATSPUBSUB_CONCURRENCY=1,
            SQLALCHEMY_DATABASE_URI=sqlite_url(folder),
        )
        self.app, self.db = app, SQLAlchemy(app)
        self.pubsub = NatsPubsub(app, db=self.db)
        self.handled = 0

        class Order(self.db.Model):  # type: ignore[name-defined]  # known at run time only
            id = sa.Column(sa.Integer, primary_key=True)

        self.order = Order

        @self.pubsub.subscriber("order.created")
        def mailer(message: dict[str, Any], context: MessageContext) -> None:
            self.db.session.add(Order())
            self.handled += 1

        with app.app_context():
            self.db.create_all()
            self.relay = self.pubsub.make_relay()
            self.worker = self.pubsub.run_worker(relay=False)

    def send(self) -> tuple[Journey, Journey]:
        """Send one message; returns its way to the commit, and from there to its end."""
        written, sent, count = Journey(), Journey(), self.handled
        with self.app.app_context():
            self.db.session.add(self.order())
            with traced(written):
                self.pubsub.publish("order.created", {"order_id": count}, outbox=True)
                self.db.session.commit()
                _until_quiet(written)
            with traced(sent):
                self.relay.step()
                eventually(lambda: self.handled > count, 10)
                _until_quiet(sent)
        return written, sent

    def close(self) -> None:
        """Stop all."""
        self.worker.stop()
        self.relay.release()
        self.pubsub.shutdown(self.app)
        with self.app.app_context():
            self.db.engine.dispose()


def _until_quiet(journey: Journey) -> None:
    """Wait until nothing has been added for a while."""
    lengths: list[int] = []

    def is_quiet() -> bool:
        lengths.append(len(journey))
        return len(lengths) > QUIET and len(set(lengths[-QUIET:])) == 1

    eventually(is_quiet, 10)


def print_way(title: str, journey: Journey, write: Callable[[str], object] = print) -> None:
    """Print the files and the calls of a journey, by thread."""
    write(f"\n{title}: {len(journey)} calls, {len(journey.files)} files, {journey.moves} moves")
    for thread in dict.fromkeys(call.thread for call in journey):
        calls = [call for call in journey if call.thread == thread]
        write(f"  [{thread}]")
        last = ""
        for call in calls:
            write(f"    {call.file if call.file != last else '':40} {call.function}")
            last = call.file


def main() -> None:
    """Print the way of one message, after a few that warm everything up."""
    with watched(), NatsServer() as server, tempfile.TemporaryDirectory() as folder:
        site = Site(server, Path(folder))
        try:
            for _ in range(4):
                ways = site.send()
            for title, way in zip(("publish, commit", "relay, handle"), ways, strict=True):
                print_way(title, way)
            whole = Journey([call for way in ways for call in way])
            files = ", ".join(sorted(whole.files))
            moves = sum(way.moves for way in ways)
            print(f"\nwhole way: {len(whole.files)} files, {moves} moves: {files}")
        finally:
            site.close()


if __name__ == "__main__":
    main()
