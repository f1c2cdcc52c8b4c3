"""The inbox on real databases, with handlers that misuse their session, and with concurrency."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy_lite import SQLAlchemy as Lite
from sqlalchemy import orm
from sqlalchemy.exc import IntegrityError

from flask_natspubsub import Discard, NatsPubsub
from flask_natspubsub.inbox.claims import WAIT
from flask_natspubsub.testing import TestBroker
from flask_natspubsub.worker.async_handlers import AsyncHandlers
from flask_natspubsub.worker.outcome import Outcome
from flask_natspubsub.worker.processor import Processor
from tests.support.databases import sqlite_url
from tests.support.waiting import eventually
from tests.unit.worker_helpers import FakeBox, FakeDelivery, envelope

LIMIT = 20


class Desk:
    """An application whose handlers note in the table ``effect`` what they do."""

    def __init__(self, url: str, name: str = "desk", **engine_options: Any) -> None:
        self.app = Flask(name)
        self.app.config.update(
            SQLALCHEMY_DATABASE_URI=url,
            SQLALCHEMY_ENGINE_OPTIONS=engine_options,
            NATSPUBSUB_URLS="memory://",
            NATSPUBSUB_USE_INBOX=True,
            NATSPUBSUB_USE_OUTBOX=True,
            NATSPUBSUB_BACKOFF=[0.01],
        )
        self.db = db = SQLAlchemy(self.app)
        self.pubsub = NatsPubsub(self.app, db)
        self.async_handlers = AsyncHandlers()
        self.box = FakeBox()

        class Effect(db.Model):  # type: ignore[name-defined,misc]
            id = sa.Column(sa.Integer, primary_key=True)
            what = sa.Column(sa.String(80), nullable=False)

        class Once(db.Model):  # type: ignore[name-defined,misc]
            name = sa.Column(sa.String(80), primary_key=True)

        self.effect_table, self.once_table = Effect.__table__, Once.__table__
        self.Effect, self.Once = Effect, Once
        with self.app.app_context():
            db.create_all()

    def close(self) -> None:
        self.async_handlers.stop()
        self.pubsub.shutdown(self.app)
        with self.app.app_context():
            for engine in self.db.engines.values():
                engine.dispose()

    def note(self, what: str = "done") -> None:
        self.db.session.add(self.Effect(what=what))

    def processor(self, handler: Callable[..., Any], **options: Any) -> Processor:
        self.pubsub.registry.add(handler, "order.created", name="mailer", **options)
        state = self.pubsub.state(self.app)
        (subscription,) = state.subscriptions()
        persistence = state.persistence
        assert persistence is not None
        return Processor(
            subscription,
            self.box,  # type: ignore[arg-type]  # stands in for it
            self.app.app_context,
            state.emit,
            self.async_handlers.run,
            persistence.inbox,
        )

    def rows(self, query: str) -> list[Any]:
        with self.app.app_context(), self.db.engine.connect() as connection:
            return [row[0] for row in connection.execute(sa.text(query))]

    @property
    def dialect(self) -> str:
        uri: str = self.app.config["SQLALCHEMY_DATABASE_URI"]
        return uri.partition("+")[0].partition(":")[0]

    @property
    def effects(self) -> list[str]:
        return self.rows("SELECT what FROM effect ORDER BY id")

    @property
    def handled(self) -> list[str]:
        return self.rows("SELECT event_id FROM natspubsub_inbox ORDER BY event_id")


@pytest.fixture(params=["sqlite", "postgresql"])
def desk(request: pytest.FixtureRequest, tmp_path: Any, env: str) -> Iterator[Desk]:
    if request.param == "sqlite":
        made = Desk(sqlite_url(tmp_path), connect_args={"timeout": 30})
    else:
        made = Desk(request.getfixturevalue("postgres_server").url(env))
    yield made
    made.close()


@pytest.fixture
def postgres_desk(postgres_server: Any, env: str) -> Iterator[Desk]:
    made = Desk(postgres_server.url(env))
    yield made
    made.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def handle(processor: Processor, **options: Any) -> tuple[Outcome, FakeDelivery]:
    delivery = FakeDelivery(**options)
    return processor.process(delivery), delivery


# --- once


def test_a_redelivery_is_acked_and_skipped(desk: Desk) -> None:
    processor = desk.processor(lambda message: desk.note())
    first, _ = handle(processor)
    second, delivery = handle(processor, attempt=2)

    assert (first.result, second.result) == ("handled", "skipped")
    assert delivery.fate == ("ack", None)
    assert desk.effects == ["done"]


def test_a_handler_that_only_reads_is_remembered_too(desk: Desk) -> None:
    processor = desk.processor(lambda message: desk.db.session.execute(sa.text("SELECT 1")).all())
    handle(processor)

    assert desk.handled == ["e1"]
    assert handle(processor)[0].result == "skipped"


def test_a_failure_takes_the_inbox_row_the_effects_and_the_events_with_it(desk: Desk) -> None:
    def handler(message: Any) -> None:
        desk.note()
        desk.pubsub.publish("order.noted", {"id": 1})
        desk.db.session.flush()
        if not desk.box.trials:
            desk.box.trials.add(1)
            raise ValueError("not yet")

    processor = desk.processor(handler)
    outcome, delivery = handle(processor)

    assert outcome.result == "retried"
    assert delivery.fate is not None
    assert delivery.fate[0] == "nak"
    assert (desk.handled, desk.effects) == ([], [])
    assert handle(processor, attempt=2)[0].result == "handled"
    assert (desk.handled, desk.effects) == (["e1"], ["done"])
    assert desk.rows("SELECT count(*) FROM natspubsub_outbox") == [1]


def test_a_dead_letter_and_a_dropped_message_leave_no_inbox_row(desk: Desk) -> None:
    def handler(message: Any) -> None:
        desk.note()
        desk.db.session.flush()
        raise Discard("no") if message["id"] == 2 else ValueError("never")

    processor = desk.processor(handler, max_deliver=1)

    assert handle(processor)[0].result == "dead_lettered"
    assert handle(processor, data=envelope({"id": 2}))[0].result == "discarded"
    assert (desk.handled, desk.effects) == ([], [])


def test_a_forced_replay_is_handled_again_and_once(desk: Desk) -> None:
    processor = desk.processor(lambda message: desk.note())
    handle(processor)
    forced = {"Nats-Msg-Id": "replay-1", "x-replay-force": "true"}

    assert handle(processor, headers={"Nats-Msg-Id": "replay-0"})[0].result == "skipped"
    assert handle(processor, headers=forced)[0].result == "handled"
    assert handle(processor, headers=forced, attempt=2)[0].result == "skipped"
    assert desk.effects == ["done", "done"]


def test_ids_that_differ_in_case_only_are_two_events(desk: Desk) -> None:
    processor = desk.processor(lambda message: desk.note())
    for event_id in ("order-a", "order-A"):
        handle(processor, data=envelope(event_id=event_id))

    assert desk.effects == ["done", "done"]


@pytest.mark.parametrize("event_id", ["x" * 300, "nul\0nul", "é" * 200])
def test_an_id_of_any_kind_is_handled_once(desk: Desk, event_id: str) -> None:
    processor = desk.processor(lambda message: desk.note())
    results = [handle(processor, data=envelope(event_id=event_id))[0].result for _ in range(2)]

    assert results == ["handled", "skipped"]
    assert desk.effects == ["done"]


def test_flask_sqlalchemy_lite_does_as_well(tmp_path: Any) -> None:
    class Base(orm.DeclarativeBase):
        pass

    class Effect(Base):
        __tablename__ = "effect"
        id: orm.Mapped[int] = orm.mapped_column(primary_key=True)

    app, db = Flask("desk"), Lite()
    app.config["SQLALCHEMY_ENGINES"] = {"default": sqlite_url(tmp_path)}
    app.config.update(NATSPUBSUB_URLS="memory://", NATSPUBSUB_USE_INBOX=True)
    db.init_app(app)
    pubsub = NatsPubsub(app, db, Base.metadata)

    @pubsub.subscriber("order.created")
    def handler(message: Any, context: Any) -> None:
        db.session.add(Effect())
        db.session.flush()
        if context.attempt == 1:
            raise ValueError

    with app.app_context():
        Base.metadata.create_all(db.engine)
    with TestBroker(app) as broker:
        broker.deliver("order.created", {"id": 1})
        broker.drain()
        broker.duplicate()
        broker.drain()
        with app.app_context():
            assert len(db.session.scalars(sa.select(Effect)).all()) == 1
            db.engine.dispose()
    assert [outcome.result for outcome in broker.outcomes] == ["retried", "handled", "skipped"]


# --- two copies at once


class Copies:
    """Two copies of one message in two threads; the first waits inside its handler."""

    def __init__(self, desk: Desk, pool: ThreadPoolExecutor, end: Callable[[], None]) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.runs = 0
        self._desk, self._pool, self._end = desk, pool, end
        self.processor = desk.processor(self._handler)

    def _handler(self, message: Any) -> None:
        self.runs += 1
        if self.runs == 1:
            self.inside.set()
            assert self.go_on.wait(LIMIT)
            self._end()
        self._desk.note(f"copy {self.runs}")

    def results(self) -> list[str]:
        first = self._pool.submit(handle, self.processor)
        assert self.inside.wait(LIMIT)
        second = self._pool.submit(handle, self.processor)
        self.wait_until_claiming(second)
        self.go_on.set()
        return [future.result(LIMIT)[0].result for future in (first, second)]

    def wait_until_claiming(self, second: Future[Any]) -> None:
        if self._desk.dialect == "postgresql":
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            eventually(lambda: self._desk.rows(waiting) == [1], LIMIT)


def test_the_second_copy_waits_for_the_first_and_is_skipped(
    desk: Desk, pool: ThreadPoolExecutor
) -> None:
    copies = Copies(desk, pool, lambda: None)

    assert copies.results() == ["handled", "skipped"]
    assert (copies.runs, desk.effects) == (1, ["copy 1"])


def test_if_the_first_copy_fails_the_second_is_handled(
    desk: Desk, pool: ThreadPoolExecutor
) -> None:
    def fail() -> None:
        raise ValueError

    copies = Copies(desk, pool, fail)

    assert copies.results() == ["retried", "handled"]
    assert desk.effects == ["copy 2"]


def test_a_handler_that_rolls_back_gives_way_to_a_copy_that_was_quicker(
    desk: Desk, pool: ThreadPoolExecutor
) -> None:
    def roll_back() -> None:
        desk.db.session.rollback()
        eventually(lambda: desk.handled == ["e1"], LIMIT)

    copies = Copies(desk, pool, roll_back)

    assert copies.results() == ["skipped", "handled"]
    assert desk.effects == ["copy 2"]


# --- handlers that end the transaction


def test_a_handler_may_roll_back_and_go_on(desk: Desk) -> None:
    def handler(message: Any) -> None:
        desk.note("lost")
        desk.db.session.flush()
        desk.db.session.rollback()
        desk.note("kept")

    processor = desk.processor(handler)

    assert [handle(processor)[0].result for _ in range(2)] == ["handled", "skipped"]
    assert (desk.effects, desk.handled) == (["kept"], ["e1"])


def test_a_handler_may_remove_its_session_and_go_on(desk: Desk) -> None:
    def handler(message: Any) -> None:
        desk.db.session.remove()
        desk.note("kept")

    processor = desk.processor(handler)

    assert [handle(processor)[0].result for _ in range(2)] == ["handled", "skipped"]
    assert (desk.effects, desk.handled) == (["kept"], ["e1"])


def test_a_handler_that_fails_in_a_savepoint_goes_on(desk: Desk) -> None:
    desk_session = desk.db.session

    def handler(message: Any) -> None:
        try:
            with desk_session.begin_nested():
                desk_session.add_all([desk.Once(name="a")])
                desk_session.flush()
                desk_session.execute(sa.insert(desk.once_table).values(name="a"))
        except IntegrityError:
            desk.note("twice")

    processor = desk.processor(handler)

    assert [handle(processor)[0].result for _ in range(2)] == ["handled", "skipped"]
    assert desk.effects == ["twice"]


def test_a_handler_may_begin_as_a_view_does(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    def book(what: str) -> None:
        with desk.db.session.begin():
            desk.note(what)
            desk.pubsub.publish("order.booked", {"what": what})

    def handler(message: dict[str, Any]) -> None:
        book("first")
        with contextlib.suppress(ZeroDivisionError), desk.db.session.begin():
            desk.note("lost")
            raise ZeroDivisionError
        with desk.db.session.begin(), desk.db.session.begin_nested():
            desk.note("second")

    with desk.app.app_context():
        book("by a view")
    processor = desk.processor(handler)
    assert [handle(processor)[0].result for _ in range(2)] == ["handled", "skipped"]
    assert desk.effects == ["by a view", "first", "second"]
    assert len(desk.rows("SELECT id FROM natspubsub_outbox")) == 2
    assert not caplog.records


def test_what_a_handler_has_begun_is_undone_if_it_fails_later(desk: Desk) -> None:
    def handler(message: dict[str, Any]) -> None:
        with desk.db.session.begin():
            desk.note()
        raise RuntimeError

    assert handle(desk.processor(handler))[0].result == "retried"
    assert (desk.effects, desk.handled) == ([], [])


def test_a_handler_may_roll_back_and_begin(desk: Desk) -> None:
    def handler(message: dict[str, Any]) -> None:
        desk.note("lost")
        desk.db.session.rollback()
        with desk.db.session.begin():
            desk.note("kept")

    assert handle(desk.processor(handler))[0].result == "handled"
    assert (desk.effects, len(desk.handled)) == (["kept"], 1)


@pytest.mark.parametrize("how", ["commit", "rollback, commit"])
def test_a_handler_that_commits_by_itself_is_named_once(
    desk: Desk, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    def handler(message: Any) -> None:
        for step in how.split(", "):
            desk.note(step)
            getattr(desk.db.session, step)()
        desk.note("more")

    processor = desk.processor(handler)
    with caplog.at_level(logging.WARNING, "flask_natspubsub.worker"):
        results = [handle(processor)[0].result for _ in range(2)]
        handle(processor, data=envelope(event_id="e2"))

    assert results == ["handled", "skipped"]
    assert desk.effects == ["commit", "more"] * 2
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "the handler mailer commits by itself"
    ]


def test_a_handler_that_fails_after_its_own_commit_is_called_again(desk: Desk) -> None:
    attempts = []

    def handler(message: Any) -> None:
        desk.note("before")
        desk.db.session.commit()
        attempts.append(1)
        if len(attempts) == 1:
            raise ValueError
        desk.note("after")

    processor = desk.processor(handler)

    assert [handle(processor)[0].result for _ in range(3)] == ["retried", "handled", "skipped"]
    assert desk.effects == ["before", "before", "after"]


def test_the_workers_own_commit_is_not_blamed_on_the_handler(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    def handler(message: Any) -> None:
        with desk.db.session.begin_nested():
            desk.note()

    with caplog.at_level(logging.WARNING, "flask_natspubsub.worker"):
        handle(desk.processor(handler))

    assert not caplog.records


# --- transactions that the database has ended


def test_effects_are_not_lost_where_the_database_has_given_the_transaction_up(
    desk: Desk,
) -> None:
    """PostgreSQL answers a COMMIT after an error with a silent rollback."""
    tries = []

    def handler(message: Any) -> None:
        desk.note()
        desk.db.session.flush()
        tries.append(1)
        if len(tries) == 1:
            desk.db.session.execute(sa.insert(desk.once_table).values(name="a"))
            with contextlib.suppress(IntegrityError):  # and no rollback: PostgreSQL gives it up
                desk.db.session.execute(sa.insert(desk.once_table).values(name="a"))

    processor = desk.processor(handler)
    first = handle(processor)[0]
    if first.result == "retried":
        assert "begin_nested" in first.detail
        assert handle(processor, attempt=2)[0].result == "handled"

    assert first.result == ("handled" if desk.dialect == "sqlite" else "retried")
    assert (desk.effects, desk.handled) == (["done"], ["e1"])


def test_a_connection_lost_at_commit_means_again(postgres_desk: Desk, postgres_server: Any) -> None:
    desk = postgres_desk
    tries = []

    def handler(message: Any) -> None:
        desk.note()
        tries.append(desk.db.session.execute(sa.text("SELECT pg_backend_pid()")).scalar_one())
        if len(tries) == 1:
            postgres_server.execute("SELECT pg_terminate_backend(%s, 5000)", tries[0])

    processor = desk.processor(handler)

    assert handle(processor)[0].result == "retried"
    assert (desk.effects, desk.handled) == ([], [])
    assert handle(processor, attempt=2)[0].result == "handled"
    assert desk.effects == ["done"]


def test_a_serialization_failure_means_again(
    postgres_server: Any, env: str, pool: ThreadPoolExecutor
) -> None:
    desk = Desk(postgres_server.url(env), isolation_level="SERIALIZABLE")
    copies = Copies(desk, pool, lambda: None)

    assert copies.results() == ["handled", "retried"]
    assert handle(copies.processor, attempt=2)[0].result == "skipped"
    assert desk.effects == ["copy 1"]
    desk.close()


# --- a claim that cannot be had


def test_waiting_for_the_database_never_makes_a_dead_letter(tmp_path: Any) -> None:
    desk = Desk(sqlite_url(tmp_path), connect_args={"timeout": 0.01})
    processor = desk.processor(lambda message: desk.note(), max_deliver=2)
    with desk.app.app_context(), desk.db.engine.begin() as other:
        other.execute(sa.insert(desk.once_table).values(name="writing"))
        outcomes = [handle(processor, attempt=attempt)[0] for attempt in (1, 2, 3)]

    assert [outcome.result for outcome in outcomes] == ["retried"] * 3
    assert "locked" in outcomes[0].detail
    assert desk.box.stored == []
    assert handle(processor, attempt=4)[0].result == "handled"
    desk.close()


def test_missing_tables_never_make_a_dead_letter(tmp_path: Any) -> None:
    desk = Desk(sqlite_url(tmp_path))
    with desk.app.app_context():
        desk.db.drop_all()
    outcome, _ = handle(desk.processor(lambda message: desk.note(), max_deliver=1))

    assert outcome.result == "retried"
    assert "flask db upgrade" in outcome.detail
    assert desk.box.stored == []
    desk.close()


def test_a_claim_that_comes_after_the_time_limit_is_given_back(
    postgres_desk: Desk, pool: ThreadPoolExecutor
) -> None:
    desk = postgres_desk
    runs = []
    processor = desk.processor(lambda message: runs.append(1))
    insert = sa.text("INSERT INTO natspubsub_inbox VALUES ('e1', 'desk<shop/mailer', 0)")
    with desk.app.app_context(), desk.db.engine.connect() as other:
        other.execute(insert)
        delivery = FakeDelivery()
        late = pool.submit(processor.process, delivery)
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        eventually(lambda: desk.rows(waiting) == [1], LIMIT)
        assert processor.take_over(delivery)
        processor.time_out(delivery)
        other.rollback()

    assert late.result(LIMIT).result == "timed_out"
    assert (runs, desk.handled) == ([], [])
    assert handle(processor, attempt=2)[0].result == "handled"


# --- async handlers


def test_an_async_handler_works_in_the_same_transaction(desk: Desk) -> None:
    fail = [True]

    async def handler(message: Any) -> None:
        desk.note()
        desk.db.session.flush()
        if fail.pop() if fail else False:
            raise ValueError

    processor = desk.processor(handler)

    assert handle(processor)[0].result == "retried"
    assert (desk.effects, desk.handled) == ([], [])
    assert [handle(processor)[0].result for _ in range(2)] == ["handled", "skipped"]
    assert desk.effects == ["done"]


# --- old rows


def test_purging_takes_the_old_rows_only(desk: Desk) -> None:
    processor = desk.processor(lambda message: None)
    for number in range(5):
        handle(processor, data=envelope(event_id=f"e{number}"))
    persistence = desk.pubsub.state(desk.app).persistence
    assert persistence is not None
    with desk.app.app_context(), desk.db.engine.begin() as connection:
        old = "UPDATE natspubsub_inbox SET processed_at = 0 WHERE event_id <> 'e3'"
        connection.execute(sa.text(old))

    assert persistence.inbox.purge(3600, batch=3) == 3
    assert persistence.inbox.purge(3600, batch=3) == 1
    assert persistence.inbox.counts() == {"desk<shop/mailer": 1}
    assert desk.handled == ["e3"]


# --- identities


def test_an_event_of_another_app_with_the_same_id_is_another_event(desk: Desk) -> None:
    processor = desk.processor(lambda message: desk.note(message["from"]))
    for app in ("shop", "evil", "desk"):
        delivery = FakeDelivery(
            envelope({"from": app}, event_id="order-1"), subject=f"test.{app}.order.created"
        )
        assert processor.process(delivery).result == "handled"
    assert desk.effects == ["shop", "evil", "desk"]
    assert desk.rows("SELECT subscriber FROM natspubsub_inbox ORDER BY subscriber") == [
        "desk/mailer",
        "desk<evil/mailer",
        "desk<shop/mailer",
    ]


def test_a_message_without_an_id_is_known_by_when_it_was_stored(desk: Desk) -> None:
    processor = desk.processor(lambda message: desk.note(f"{message['n']}"))
    for n, stored_at in ((1, 1_750_000_000.0), (1, 1_750_000_000.0), (2, 1_750_000_060.0)):
        delivery = FakeDelivery(b'{"message": {"n": %d}}' % n)
        delivery.timestamp = stored_at  # the stream was made anew, and counts from 1 again
        processor.process(delivery)
    assert desk.effects == ["1", "2"]


def test_a_forced_replay_cannot_take_the_id_of_another_event(desk: Desk) -> None:
    processor = desk.processor(lambda message: desk.note())
    forged = {"x-replay-force": "true", "Nats-Msg-Id": "victim"}
    handle(processor, data=envelope(event_id="mine"), headers=forged)
    assert handle(processor, data=envelope(event_id="victim"))[0].result == "handled"
    assert len(desk.effects) == 2


# --- rows of version 0.1, which had no app in their keys


def old_row(desk: Desk, event_id: str = "e1", age: float = 60.0) -> None:
    with desk.app.app_context(), desk.db.engine.begin() as connection:
        statement = sa.text("INSERT INTO natspubsub_inbox VALUES (:id, 'mailer', :at)")
        connection.execute(statement, {"id": event_id, "at": time.time() - age})


def test_what_the_old_version_has_handled_is_skipped(desk: Desk) -> None:
    old_row(desk)
    processor = desk.processor(lambda message: desk.note(message["n"]))
    assert handle(processor, data=envelope({"n": "1"}, event_id="e1"))[0].result == "skipped"
    assert handle(processor, data=envelope({"n": "2"}, event_id="e2"))[0].result == "handled"
    assert desk.effects == ["2"]
    # A worker of the old version, which may still run, has to find it as well.
    assert "mailer" in desk.rows("SELECT subscriber FROM natspubsub_inbox WHERE event_id = 'e2'")


def test_an_old_row_of_another_life_of_the_stream_does_not_count(desk: Desk) -> None:
    old_row(desk, "test-events-stream:7", age=3600)
    processor = desk.processor(lambda message: desk.note())
    delivery = FakeDelivery(b'{"message": {}}')
    delivery.timestamp = time.time()
    assert processor.process(delivery).result == "handled"


def test_two_apps_on_one_database_do_not_take_each_others_rows(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path)
    one, other = Desk(url), Desk(url, "till")
    try:
        old_row(one, "e0")  # the keys of the old version are in use
        for desk in (one, other):
            note = desk.note
            processor = desk.processor(lambda message, context, note=note: note())
            assert handle(processor, data=envelope(event_id="e1"))[0].result == "handled"
        assert len(one.effects) == 2
    finally:
        one.close()
        other.close()


def test_a_failed_handler_leaves_no_row_of_either_version(desk: Desk) -> None:
    old_row(desk, "e0")
    processor = desk.processor(_fail)
    assert handle(processor, data=envelope(event_id="e1"))[0].result == "retried"
    assert desk.handled == ["e0"]


def _fail(message: Any) -> None:
    raise ValueError("no")


def test_the_old_version_at_work_on_the_same_event_is_waited_for(
    postgres_desk: Desk, pool: ThreadPoolExecutor
) -> None:
    desk = postgres_desk
    old_row(desk, "e0")
    processor = desk.processor(lambda message: desk.note())
    insert = sa.text("INSERT INTO natspubsub_inbox VALUES ('e1', 'mailer', 1e9)")
    with desk.app.app_context(), desk.db.engine.connect() as other:
        other.execute(insert)
        late = pool.submit(processor.process, FakeDelivery(envelope(event_id="e1")))
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        eventually(lambda: desk.rows(waiting) == [1], LIMIT)
        other.commit()
    assert late.result(LIMIT).result == "skipped"
    assert desk.effects == []


def test_a_new_database_has_no_rows_of_the_old_version(desk: Desk) -> None:
    processor = desk.processor(lambda message: desk.note())
    handle(processor, data=envelope(event_id="e1"))
    assert desk.rows("SELECT subscriber FROM natspubsub_inbox") == ["desk<shop/mailer"]


def test_a_rename_takes_all_rows_of_a_subscriber_along(desk: Desk) -> None:
    processor = desk.processor(lambda message: None)
    old_row(desk, "e0")
    handle(processor, data=envelope(event_id="e1"))
    own = FakeDelivery(envelope(event_id="e2"), subject="test.desk.order.created")
    processor.process(own)
    processor.process(FakeDelivery(b'{"message": {}}'))
    persistence = desk.pubsub.state(desk.app).persistence
    assert persistence is not None
    before = sum(persistence.inbox.counts().values())
    assert persistence.inbox.rename("desk", "mailer", "post") == before
    assert set(persistence.inbox.counts()) == {
        "post",
        "desk/post",
        "desk</post",
        "desk<shop/post",
    }
    assert persistence.inbox.rename("desk", "mailer", "post") == 0


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        pytest.param("postgres", "SHOW lock_timeout", id="postgresql"),
        pytest.param("mysql", "SELECT @@SESSION.innodb_lock_wait_timeout", id="mysql"),
    ],
)
def test_a_lock_that_is_not_given_up_is_waited_for_briefly_and_counts_against_nobody(
    request: pytest.FixtureRequest, env: str, pool: ThreadPoolExecutor, kind: str, limit: str
) -> None:
    """The database keeps the transaction of a machine that has vanished, with the inbox row."""
    with contextlib.closing(Desk(request.getfixturevalue(f"{kind}_server").url(env))) as desk:
        (its_own,) = desk.rows(limit)
        has_row, may_end = threading.Event(), threading.Event()

        def handler(message: Any) -> None:
            has_row.set()
            assert may_end.wait(60)
            shown = desk.db.session.execute(sa.text(limit)).scalar_one()
            desk.note(str(shown))

        processor = desk.processor(handler, max_deliver=2)
        vanished = pool.submit(handle, processor)
        assert has_row.wait(20)
        began = time.monotonic()
        late = [handle(processor, attempt=attempt) for attempt in (2, 3)]
        took = time.monotonic() - began
        may_end.set()

        assert [outcome.result for outcome, _ in late] == ["retried"] * 2
        assert 2 * WAIT <= took < 5 * WAIT
        fates = [delivery.fate or ("none", 0.0) for _, delivery in late]
        assert [how for how, _ in fates] == ["nak"] * 2
        assert all(0 < (delay or 0) < 5 for _, delay in fates)
        assert desk.box.stored == []
        assert vanished.result(20)[0].result == "handled"
        assert desk.effects == [str(its_own)]  # the limit is for the row of the inbox only
        assert handle(processor, attempt=4)[0].result == "skipped"
