"""``TestBroker`` and the fixture: production code on a broker in memory and a virtual clock."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from flask import Flask, current_app, g

from flask_natspubsub import (
    CircuitOpen,
    DeadLetter,
    DecodingError,
    Discard,
    NatsPubsub,
    NotConnected,
    PublishError,
    Retry,
    Subscriber,
    message_handled,
)
from flask_natspubsub.testing import TestBroker

ROOT = Path(__file__).parents[2]


class Project:
    """An app as a project has it: configured for a server that is not there."""

    def __init__(self, **settings):
        self.app = Flask("shop")
        self.app.config["NATSPUBSUB_URLS"] = "nats://127.0.0.1:1"
        for key, value in settings.items():
            self.app.config[f"NATSPUBSUB_{key.upper()}"] = value
        self.pubsub = NatsPubsub(self.app)
        self.publish = self.pubsub.publish
        self.seen = []

    def subscribe(self, *topics, name="mailer", then=lambda message, context: None, **options):
        def handler(message, context):
            self.seen.append((message, context))
            return then(message, context)

        self.pubsub.registry.add(handler, *topics, name=name, **options)

    @property
    def messages(self):
        return [message for message, _ in self.seen]


@pytest.fixture
def project():
    return Project()


@pytest.fixture
def broker(project):
    with TestBroker(project.app) as broker:
        yield broker


def test_a_class_that_an_earlier_test_defined_receives_nothing(project):
    received = []

    def earlier_test():
        class Left(Subscriber):
            topics = "order.created"

            def handle(self, message):
                received.append(message)

    gc.disable()  # or it might be gone before the broker looks
    try:
        earlier_test()
        with TestBroker(project.app) as broker:
            broker.deliver("order.created", {})
    finally:
        gc.enable()

    assert received == []


def fail_until(attempt):
    def then(message, context):
        if context.attempt < attempt:
            raise ValueError("not yet")

    return then


# --- in and out


def test_an_app_without_the_extension_is_told_so():
    with pytest.raises(RuntimeError, match="no NatsPubsub extension"):
        TestBroker(Flask("bare"))


def test_it_is_put_in_place_of_the_apps_broker_and_taken_out_again(project):
    state = project.pubsub.state()
    with TestBroker(project.app):
        replaced = state.broker()
        assert project.pubsub.is_connected
    assert state.broker() is not replaced
    project.pubsub.shutdown()


def test_a_broker_that_was_in_use_is_put_back(project):
    state = project.pubsub.state()
    own = state.broker()
    with TestBroker(project.app):
        assert state.broker() is not own
    assert state.broker() is own
    project.pubsub.shutdown()


def test_tests_do_not_see_each_others_messages(project):
    with TestBroker(project.app) as broker:
        project.publish("order.created", {"id": 1})
    with TestBroker(project.app) as broker:
        assert broker.published == []


def test_no_thread_is_started_unless_a_handler_is_async(project):
    before = threading.active_count()
    with TestBroker(project.app) as broker:
        project.subscribe("order.created", then=fail_until(3))
        project.publish("order.created", {})
        broker.drain()
        assert threading.active_count() == before


# --- what was published


def test_published_messages_are_shown_decoded(project, broker):
    receipt = project.publish(
        "Order.Created", {"id": 1}, trace_id="t1", headers={"x-custom": "yes"}
    )
    (one,) = broker.published

    assert (one.topic, one.message, one.event_id) == (
        "Order.Created",
        {"id": 1},
        receipt.event_id,
    )
    assert (one.trace_id, one.subject) == ("t1", "development.shop.order.created")
    assert one.headers["x-custom"] == "yes"
    assert one.envelope["producer"] == "shop"
    assert one.sequence == receipt.sequence == 1


def test_published_messages_are_found_by_topic(project, broker):
    for number, topic in enumerate(["order.created", "order.paid", "user.created"]):
        project.publish(topic, {"n": number})

    def numbers(topic):
        return [one.message["n"] for one in broker.published_to(topic)]

    assert numbers("order.created") == [0]
    assert numbers("Order.Created") == [0]
    assert numbers("order.*") == [0, 1]
    assert numbers("*.created") == [0, 2]
    assert numbers(">") == [0, 1, 2]
    assert numbers("order") == []


def test_bytes_that_are_no_message_are_not_among_the_published(project, broker):
    broker.deliver("order.created", b"?")
    assert broker.published == []


def test_assert_published_returns_the_first_that_fits(project, broker):
    for number in (1, 2, 2):
        project.publish("order.created", {"id": number, "state": "new", "note": None})

    assert broker.assert_published("order.created").message["id"] == 1
    assert broker.assert_published("order.created", id=2, state="new").sequence == 2
    assert broker.assert_published("order.created", note=None).sequence == 1
    assert broker.assert_published("order.*", id=2).sequence == 2


def test_assert_published_lists_what_was_published_to_the_topic(project, broker):
    project.publish("order.created", {"id": 1})
    project.publish("user.created", {"id": 7})
    with pytest.raises(AssertionError) as failed:
        broker.assert_published("order.created", id=2)
    assert str(failed.value) == (
        "order.created with {'id': 2} was not published; published to this topic:\n"
        "  order.created: {'id': 1}"
    )
    with pytest.raises(AssertionError):
        broker.assert_published("order.created", missing=None)


def test_assert_published_lists_the_topics_if_nothing_was_published_to_it(project, broker):
    with pytest.raises(AssertionError) as failed:
        broker.assert_published("order.paid")
    assert str(failed.value) == "order.paid was not published; published topics: none"

    project.publish("user.created", {"id": 7})
    project.publish("order.created", {"id": 1})
    project.publish("order.created", {"id": 2})
    with pytest.raises(AssertionError) as failed:
        broker.assert_published("order.paid", topic="x")
    assert str(failed.value) == (
        "order.paid with {'topic': 'x'} was not published; "
        "published topics: order.created, user.created"
    )


def test_assert_not_published_shows_what_was(project, broker):
    project.publish("order.created", {"id": 1})

    broker.assert_not_published("order.paid")
    broker.assert_not_published("order.created", id=2)
    with pytest.raises(AssertionError) as failed:
        broker.assert_not_published("order.created", id=1)
    assert str(failed.value) == "order.created was published: {'id': 1}"
    with pytest.raises(AssertionError):
        broker.assert_not_published("order.>")


# --- delivering


def test_nothing_is_handled_before_it_is_drained(project, broker):
    project.subscribe("order.created")
    project.publish("order.created", {"id": 1})
    assert project.seen == []
    assert broker.drain() == 1
    assert project.messages == [{"id": 1}]
    assert broker.drain() == 0


def test_delivering_is_publishing_as_somebody_else(project, broker):
    project.subscribe("invoice.sent", producer="billing")
    count = broker.deliver(
        "invoice.sent",
        {"id": 1},
        producer="billing",
        event_id="e1",
        trace_id="t1",
        headers={"x-custom": "yes"},
    )

    assert count == 1
    ((message, context),) = project.seen
    assert message == {"id": 1}
    assert (context.event_id, context.trace_id, context.producer) == ("e1", "t1", "billing")
    assert context.subject == "development.billing.invoice.sent"
    assert context.headers["x-custom"] == "yes"


def test_bytes_are_delivered_as_they_are(project, broker):
    project.subscribe("order.created")
    broker.deliver("order.created", b'{"event_id":"e1","payload":{"id":1}}')
    broker.deliver("order.created", b"?")

    assert project.messages == [{"id": 1}]
    (letter,) = broker.dead_letters
    assert (letter.reason, letter.data) == ("malformed", b"?")


@dataclass
class Order:
    id: int


def test_typed_messages_are_really_encoded_and_decoded(project, broker):
    seen = []

    @project.pubsub.subscriber("order.created")
    def handle(message: Order):
        seen.append(message)

    sent = Order(1)
    project.publish("order.created", sent)
    broker.drain()
    assert seen == [sent]
    assert seen[0] is not sent

    broker.deliver("order.created", {"id": "one"})
    assert [letter.reason for letter in broker.dead_letters] == ["schema"]


def test_retries_run_on_a_virtual_clock(project, broker):
    began = time.monotonic()
    project.subscribe("order.created", then=fail_until(4), backoff=[3600])
    project.publish("order.created", {"id": 1})

    assert broker.drain() == 4
    assert [context.attempt for _, context in project.seen] == [1, 2, 3, 4]
    assert [outcome.result for outcome in broker.outcomes] == ["retried"] * 3 + ["handled"]
    assert broker.dead_letters == []
    assert time.monotonic() - began < 60


def test_messages_given_up_on_are_dead_letters(project, broker):
    project.subscribe("order.created", then=fail_until(99), max_deliver=3)
    project.publish("order.created", {"id": 1})
    broker.drain()

    (letter,) = broker.dead_letters
    assert (letter.subscriber, letter.reason, letter.deliveries) == ("mailer", "handler_error", 3)
    assert letter.error == "ValueError: not yet"


def test_verdicts_of_handlers_are_obeyed(project, broker):
    def then(message, context):
        if context.attempt == 1:
            raise Retry(30)
        raise DeadLetter("no")

    project.subscribe("order.created", then=then)
    project.publish("order.created", {"id": 1})
    assert broker.drain() == 2
    assert [letter.reason for letter in broker.dead_letters] == ["rejected"]


def test_what_handlers_publish_is_delivered_too_with_its_lineage(project, broker):
    project.subscribe(
        "order.created", name="first", then=lambda *_: project.publish("order.paid", {"id": 1})
    )
    project.subscribe("order.paid", name="second")
    project.publish("order.created", {"id": 1}, trace_id="t1", event_id="e1")

    assert broker.drain() == 2
    context = project.seen[1][1]
    assert (context.topic, context.trace_id, context.causation_id) == ("order.paid", "t1", "e1")


def test_handlers_that_never_stop_publishing_are_an_error(project, broker, monkeypatch):
    monkeypatch.setattr("flask_natspubsub.testing.broker.MAX_DELIVERIES", 50)
    project.subscribe("order.created", then=lambda m, c: project.publish("order.created", m))
    project.publish("order.created", {})
    with pytest.raises(AssertionError, match="After 51 deliveries there are still more"):
        broker.drain()


def test_handlers_run_in_this_thread_in_app_contexts_of_their_own(project, broker):
    found = []

    def then(message, context):
        found.append((threading.current_thread(), current_app.name, g.get("n")))
        g.n = 1

    project.subscribe("order.created", then=then)
    with project.app.app_context():
        g.n = "the test's"
        project.publish("order.created", {})
        project.publish("order.created", {})
        broker.drain()
        assert g.n == "the test's"
    assert found == [(threading.current_thread(), "shop", None)] * 2


def test_async_handlers_are_run(project, broker):
    seen = []

    @project.pubsub.subscriber("order.created", timeout=0.05, max_deliver=1)
    async def handle(message, context):
        seen.append((message, current_app.name))
        if message.get("hang"):
            await asyncio.Event().wait()

    project.publish("order.created", {"id": 1})
    project.publish("order.created", {"hang": True})
    broker.drain()
    assert seen == [({"id": 1}, "shop"), ({"hang": True}, "shop")]
    (letter,) = broker.dead_letters
    assert letter.error == "HandlerTimeout: The handler ran longer than 0.05 s."


def test_subscribers_declared_later_are_run_too(project, broker):
    project.publish("order.created", {"id": 1})
    project.subscribe("order.created")
    broker.drain()
    assert project.messages == [{"id": 1}]


def test_signals_are_sent(project, broker):
    told = []

    def receive(sender, context, **_):
        told.append((sender, context.event_id))

    message_handled.connect(receive, project.app)
    project.subscribe("order.created")
    project.publish("order.created", {}, event_id="e1")
    broker.drain()
    assert told == [(project.app, "e1")]


def test_dead_letters_can_be_replayed(project, broker):
    broken = True

    def then(message, context):
        if broken:
            raise DeadLetter("broken")

    project.subscribe("order.created", then=then)
    project.publish("order.created", {"id": 1})
    broker.drain()
    broken = False
    (letter,) = broker.dead_letters
    project.pubsub.dead_letters.replay(letter)
    assert broker.drain() == 1
    assert broker.dead_letters == []


def test_two_apps_of_one_extension_have_a_broker_each():
    pubsub = NatsPubsub()
    seen = []

    @pubsub.subscriber("order.created")
    def handle(message):
        seen.append((current_app.name, message["n"]))

    apps = [Flask("shop"), Flask("billing")]
    for app in apps:
        pubsub.init_app(app)
    with TestBroker(apps[0]) as one, TestBroker(apps[1]) as two:
        for number, app in enumerate(apps):
            with app.app_context():
                pubsub.publish("order.created", {"n": number})
        assert (one.drain(), two.drain()) == (1, 1)
    assert seen == [("shop", 0), ("billing", 1)]


# --- faults


def test_publishes_can_be_made_to_fail(project, broker):
    broker.fail_publishes(2)
    for _ in range(2):
        with pytest.raises(PublishError):
            project.publish("order.created", {"id": 1})
    project.publish("order.created", {"id": 2})
    assert [one.message["id"] for one in broker.published] == [2]


def test_a_dead_letter_that_cannot_be_stored_keeps_its_message(project, broker):
    project.subscribe("order.created", then=fail_until(99), max_deliver=1)
    project.publish("order.created", {"id": 1})
    broker.fail_publishes(1)
    broker.drain()

    assert len(broker.dead_letters) == 1
    assert len(project.seen) == 2, "the first dead letter was not stored: once more"


def test_messages_can_be_delivered_twice(project, broker):
    project.subscribe("order.created")
    project.publish("order.created", {"id": 1}, event_id="e1")
    broker.drain()
    broker.duplicate()
    assert broker.drain() == 1
    assert [(context.event_id, context.attempt) for _, context in project.seen] == [
        ("e1", 1),
        ("e1", 2),
    ]
    assert broker.drain() == 0


def test_acknowledgements_can_be_lost(project, broker):
    project.subscribe("order.created")
    for number in range(3):
        project.publish("order.created", {"id": number})
    broker.drop_acks(1)
    assert broker.drain() == 4
    assert [message["id"] for message in project.messages] == [0, 1, 2, 0]


def test_the_connection_can_be_cut_and_mended(project, broker):
    project.subscribe("order.created")
    project.publish("order.created", {"id": 1})
    broker.disconnect()

    with pytest.raises(NotConnected):
        project.publish("order.created", {"id": 2})
    assert not project.pubsub.is_connected
    assert broker.drain() == 0
    assert len(broker.published) == 1
    assert broker.dead_letters == []
    assert broker.deliver("order.created", {"id": 3}) == 0
    assert not project.pubsub.is_connected

    broker.reconnect()
    assert project.pubsub.is_connected
    assert broker.drain() == 2
    assert [message["id"] for message in project.messages] == [1, 3]


def test_the_circuit_breaker_works_as_in_production():
    project = Project(breaker_threshold=2)
    with TestBroker(project.app) as broker:
        broker.fail_publishes(2)
        for _ in range(2):
            with pytest.raises(PublishError):
                project.publish("order.created", {})
        with pytest.raises(CircuitOpen):
            project.publish("order.created", {})


def test_the_clock_can_be_moved(project, broker):
    """For instance past the time in which a second copy of an event is recognised."""
    project.publish("order.created", {"id": 1}, event_id="e1")
    assert project.publish("order.created", {"id": 1}, event_id="e1").duplicate
    broker.advance(121)
    assert not project.publish("order.created", {"id": 1}, event_id="e1").duplicate
    assert len(broker.published) == 2


# --- the plugin, in projects of others

PROJECT = {
    "shop.py": """
        from flask import Flask
        from flask_natspubsub import NatsPubsub

        pubsub = NatsPubsub()


        @pubsub.subscriber("order.created", backoff=[60])
        def confirm(message, context):
            if context.attempt < 3:
                raise ValueError("the mail server is away")
            pubsub.publish("mail.sent", {"order": message["id"]})


        def create_app():
            app = Flask(__name__)
            app.config["NATSPUBSUB_URLS"] = "nats://127.0.0.1:1"
            pubsub.init_app(app)

            @app.post("/orders")
            def order():
                pubsub.publish("order.created", {"id": 7})
                return "", 201

            return app
    """,
    "test_shop.py": """
        import pytest
        from shop import create_app


        @pytest.fixture
        def app():
            return create_app()


        CLIENT


        def test_an_order_is_confirmed(client, pubsub_broker):
            assert client.post("/orders").status_code == 201
            pubsub_broker.assert_published("order.created", id=7)
            pubsub_broker.assert_not_published("mail.sent")
            assert pubsub_broker.drain() == 3
            pubsub_broker.assert_published("mail.sent", order=7)
            assert pubsub_broker.dead_letters == []


        def test_each_test_starts_afresh(client, pubsub_broker):
            assert pubsub_broker.published == []


        def test_nothing_is_replaced_unless_asked_for(app):
            from shop import pubsub

            assert not pubsub.state(app).broker().is_connected
            pubsub.shutdown(app)
    """,
}

CLIENT = """
        @pytest.fixture
        def client(app):
            return app.test_client()
"""


@pytest.mark.parametrize("with_pytest_flask", [True, False])
def test_the_fixture_works_with_and_without_pytest_flask(tmp_path, with_pytest_flask):
    for name, text in PROJECT.items():
        text = text.replace("        CLIENT\n", "" if with_pytest_flask else CLIENT)
        (tmp_path / name).write_text(textwrap.dedent(text))
    options = [] if with_pytest_flask else ["-p", "no:flask"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 passed" in run.stdout
    plugins = next(line for line in run.stdout.splitlines() if line.startswith("plugins:"))
    assert ("flask-1" in plugins) is with_pytest_flask


def test_the_messages_of_a_project_are_plain_json(project, broker):
    """What a test sees is what another client would read."""
    project.publish("order.created", {"name": "Zoë"}, event_id="e1")
    (stored,) = project.pubsub.state().broker().messages("development-events-stream")
    assert json.loads(stored.data)["message"] == {"name": "Zoë"}
    assert "Zoë".encode() in stored.data


# --- step by step, and errors


def fails_with(error):
    def then(message, context):
        raise error

    return then


def test_retries_can_be_left_waiting(project, broker):
    project.subscribe("order.created", then=fails_with(ValueError("no")), backoff=[60])
    with project.app.app_context():
        project.publish("order.created", {})

    assert broker.drain(retries=False) == 1
    assert broker.drain(retries=False) == 0
    broker.advance(100)
    assert broker.drain(retries=False) == 1
    assert [outcome.attempt for outcome in broker.outcomes] == [1, 2]
    assert broker.dead_letters == []


def test_one_step_is_one_delivery(project, broker):
    project.subscribe("order.created", name="first")
    project.subscribe("order.created", name="second")
    with project.app.app_context():
        project.publish("order.created", {"n": 1})
        project.publish("order.created", {"n": 2})

    steps = []
    while (outcome := broker.step()) is not None:
        steps.append(outcome)
        assert len(project.seen) == len(steps)

    assert {outcome.subscriber for outcome in steps} == {"first", "second"}
    assert len(steps) == 4
    assert broker.outcomes == steps


def test_a_step_does_not_move_the_clock(project, broker):
    project.subscribe("order.created", then=fails_with(ValueError("no")), backoff=[60])
    with project.app.app_context():
        project.publish("order.created", {})

    assert broker.step().result == "retried"
    assert broker.step() is None


def test_what_a_handler_raises_can_be_raised_in_the_test(project, broker):
    project.subscribe("order.created", then=fails_with(KeyError("id")))
    with project.app.app_context():
        project.publish("order.created", {})

    with pytest.raises(KeyError, match="id") as caught:
        broker.drain(raise_errors=True)

    assert caught.traceback[-1].name == "then"
    assert [outcome.result for outcome in broker.outcomes] == ["retried"]
    assert broker.drain() == 4, "it goes on where it stopped"
    assert len(broker.dead_letters) == 1
    with pytest.raises(KeyError):
        broker.deliver("order.created", {}, raise_errors=True)


@pytest.mark.parametrize("verdict", [Retry(), DeadLetter("no"), Discard("no")])
def test_what_a_handler_says_of_its_message_is_not_raised(project, broker, verdict):
    project.subscribe("order.created", then=fails_with(verdict))

    assert broker.deliver("order.created", {}, raise_errors=True) >= 1


def test_a_message_that_cannot_be_read_is_raised_too(project, broker):
    project.subscribe("order.created")

    with pytest.raises(DecodingError):
        broker.deliver("order.created", b"no json", raise_errors=True)


def test_a_dead_letter_says_where_the_handler_failed(project, broker):
    project.subscribe("order.created", then=fails_with(ValueError("no")), max_deliver=1)

    broker.deliver("order.created", {})

    (letter,) = broker.dead_letters
    line = fails_with.__code__.co_firstlineno + 2
    assert letter.traceback.endswith(f"test_test_broker.py:{line} in then")
    assert letter.headers["x-dlq-traceback"] == letter.traceback


# --- several apps


def test_one_broker_for_two_apps(project):
    billing = Project(app_name="billing")
    project.subscribe("invoice.sent", producer="billing")
    billing.subscribe(
        "order.created",
        producer="shop",
        then=lambda message, context: billing.publish("invoice.sent", {"for": message["n"]}),
    )

    with TestBroker(project.app, billing.app) as broker:
        with project.app.app_context():
            project.publish("order.created", {"n": 1})
        assert broker.drain() == 2
        broker.assert_published("invoice.sent", **{"for": 1})
        broker.deliver("order.created", b"no json")
        assert [letter.subscriber for letter in broker.dead_letters] == ["mailer"]

    assert project.messages == [{"for": 1}]
    assert project.pubsub.state(project.app).broker() is not billing.pubsub.state().broker()


def run_project(tmp_path, conftest, test):
    (tmp_path / "conftest.py").write_text(textwrap.dedent(conftest))
    (tmp_path / "test_it.py").write_text(textwrap.dedent(test))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


APP = """
    import pytest
    from flask import Flask
    from flask_natspubsub import NatsPubsub

    pubsub = NatsPubsub()

    @pytest.fixture{options}
    def {name}({needs}):
        app = Flask("shop")
        pubsub.init_app(app)
        return app
"""
EMPTY = "def test_it(pubsub_broker): assert pubsub_broker.published == []"


@pytest.mark.parametrize(
    ("conftest", "said"),
    [
        (APP.format(name="application", needs="", options=""), "1 passed"),
        (APP.format(name="flask_app", needs="", options="(name='pubsub_app')"), "1 passed"),
        (APP.format(name="flask_app", needs="", options=""), "define a fixture 'pubsub_app'"),
        (APP.format(name="app", needs="missing", options=""), "fixture 'missing' not found"),
    ],
)
def test_the_app_is_found_by_the_name_of_its_fixture(tmp_path, conftest, said):
    done = run_project(tmp_path, conftest, EMPTY)

    assert said in done.stdout


def test_a_test_without_the_fixture_is_told_of_it():
    pubsub = NatsPubsub()
    app = Flask("shop")
    app.config.update(NATSPUBSUB_URLS="nats://127.0.0.1:1", NATSPUBSUB_PUBLISH_TIMEOUT=0.2)
    pubsub.init_app(app)

    with app.app_context(), pytest.raises(NotConnected, match="the fixture pubsub_broker"):
        pubsub.publish("order.created", {})
    pubsub.shutdown(app)
