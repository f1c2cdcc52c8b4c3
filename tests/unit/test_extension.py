"""The extension object and the state it keeps for each application."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import threading
import weakref

import pytest
from flask import Flask

from flask_natspubsub import ConfigurationError, NatsPubsub
from flask_natspubsub.app.state import AppState


def make_app(name: str = "shop", **settings: object) -> Flask:
    app = Flask(name)
    app.config |= {"NATSPUBSUB_URLS": "memory://", "NATSPUBSUB_ENV": "test"}
    app.config |= {f"NATSPUBSUB_{key.upper()}": value for key, value in settings.items()}
    return app


def sequences(pubsub: NatsPubsub, app: Flask) -> list[int]:
    messages = pubsub.state(app).broker().messages("test-events-stream")
    return [message.sequence for message in messages]


# --- init_app


def test_init_app_starts_no_thread_and_opens_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = threading.enumerate()

    NatsPubsub(make_app(urls="nats://192.0.2.1:4222", health_url_prefix="/health"))

    assert threading.enumerate() == before


def test_init_app_imports_neither_asyncio_nor_nats() -> None:
    code = (
        "import sys; from flask import Flask; from flask_natspubsub import NatsPubsub;"
        "NatsPubsub(Flask('x')); print([m for m in ('asyncio', 'nats') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )

    assert done.stdout.strip() == "[]"


def test_the_state_is_in_the_apps_extensions() -> None:
    app = make_app()
    pubsub = NatsPubsub(app)

    assert isinstance(app.extensions["natspubsub"], AppState)
    assert pubsub.state() is app.extensions["natspubsub"]
    assert pubsub.state().app is app


def test_a_second_init_app_raises() -> None:
    app = make_app()
    pubsub = NatsPubsub(app)

    for other in (pubsub, NatsPubsub()):
        with pytest.raises(ConfigurationError, match="registered on this Flask app already"):
            other.init_app(app)


def test_the_shell_knows_pubsub() -> None:
    app = make_app()
    pubsub = NatsPubsub(app)

    assert app.make_shell_context()["pubsub"] is pubsub


# --- whose turn it is


def test_with_one_app_no_context_is_needed() -> None:
    app = make_app()
    pubsub = NatsPubsub(app)

    assert pubsub.publish("a", {}).stream == "test-events-stream"


def test_with_two_apps_the_context_decides() -> None:
    one, two = make_app("one"), make_app("two")
    pubsub = NatsPubsub(one)
    pubsub.init_app(two)

    with one.app_context():
        assert pubsub.publish("a", {}).subject == "test.one.a"
    with two.app_context():
        assert pubsub.publish("a", {}).subject == "test.two.a"
    with pytest.raises(RuntimeError, match=r"no application context.*2 Flask apps"):
        pubsub.publish("a", {})


def test_without_any_app_the_error_says_so() -> None:
    with pytest.raises(RuntimeError, match="no Flask app"):
        NatsPubsub().publish("a", {})


def test_in_the_context_of_an_app_of_nobodys_the_error_names_it() -> None:
    app = make_app()
    pubsub = NatsPubsub(app)

    with (
        Flask("stranger").app_context(),
        pytest.raises(RuntimeError, match=r"'stranger' is not registered.*init_app"),
    ):
        pubsub.publish("a", {})
    with app.app_context(), pytest.raises(RuntimeError, match="not registered"):
        NatsPubsub().publish("a", {})


def test_two_apps_share_nothing_but_the_extension() -> None:
    one, two = make_app("one"), make_app("two")
    pubsub = NatsPubsub()
    pubsub.init_app(one)
    pubsub.init_app(two)

    with one.app_context():
        pubsub.publish("a", {})

    assert pubsub.state(one).broker() is not pubsub.state(two).broker()
    assert (sequences(pubsub, one), sequences(pubsub, two)) == ([1], [])


# --- the end


def test_after_shutdown_the_next_use_connects_anew() -> None:
    app = make_app()
    pubsub = NatsPubsub(app)
    first = pubsub.state().broker()
    pubsub.publish("a", {})

    pubsub.shutdown()

    assert not first.is_connected
    assert pubsub.publish("a", {}).sequence == 1
    assert pubsub.state().broker() is not first


def test_shutdown_of_one_app_leaves_the_other_alone() -> None:
    one, two = make_app("one"), make_app("two")
    pubsub = NatsPubsub(one)
    pubsub.init_app(two)
    brokers = [pubsub.state(app).broker() for app in (one, two)]

    pubsub.shutdown(one)
    assert [broker.is_connected for broker in brokers] == [False, True]

    pubsub.shutdown()
    pubsub.shutdown()
    assert [broker.is_connected for broker in brokers] == [False, False]


def test_an_extension_that_was_never_used_can_be_shut_down() -> None:
    app = make_app(urls="nats://192.0.2.1:4222")

    NatsPubsub(app).shutdown(app)
    NatsPubsub().shutdown()


def test_threads_that_come_first_at_once_get_one_broker() -> None:
    app = make_app()
    pubsub = NatsPubsub(app)
    barrier = threading.Barrier(8)
    brokers = []

    def use() -> None:
        barrier.wait(5)
        brokers.append(pubsub.state().broker())

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)

    assert len(brokers) == 8
    assert len(set(map(id, brokers))) == 1


def test_a_broker_without_auto_setup_creates_no_stream_and_is_kept() -> None:
    app = make_app()
    state = NatsPubsub(app).state()
    assert not state.has_broker

    broker = state.broker(auto_setup=False)

    assert broker.stream_info("test-events-stream") is None
    assert state.broker() is broker
    state.close()
    assert not state.has_broker
    assert state.broker().stream_info("test-events-stream") is not None


def test_a_worker_relays_where_there_is_a_database_only() -> None:
    app = make_app()
    pubsub = NatsPubsub(app)

    worker = pubsub.make_worker()

    assert not worker.relays
    assert worker.loops == ["monitor", "handler threads", "async handlers"]


def test_a_hundred_apps_leave_nothing_behind() -> None:
    pubsub = NatsPubsub()
    gone = []
    for number in range(100):
        app = make_app(f"app{number}")
        pubsub.init_app(app)
        with app.app_context():
            pubsub.publish("a", {})
        pubsub.shutdown(app)
        gone.append(weakref.ref(app))
    del app

    gc.collect()

    assert [ref() for ref in gone if ref() is not None] == []


# --- secrets


def test_nothing_that_is_printed_has_a_secret() -> None:
    app = make_app(urls="nats://user:s3cr3t@host", password="s3cr3t", user="u")
    pubsub = NatsPubsub(app)
    state = pubsub.state()

    for thing in (pubsub, state, state.settings, state.publisher, state.broker()):
        assert "s3cr3t" not in repr(thing)
        assert "s3cr3t" not in str(thing)
