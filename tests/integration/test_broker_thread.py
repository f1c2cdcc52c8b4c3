"""The broker's thread, which serves all of a process, outlives what others call in it."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from flask_natspubsub import NatsPubsub, PublishError, message_published
from flask_natspubsub.brokers.jetstream import nats_py
from flask_natspubsub.messages.message import Message
from tests.conftest import MakePubsub
from tests.support.proxy import Proxy
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

from .helpers import event_ids, stored

pytestmark = pytest.mark.real_server


class Leaver:
    """A callback that notes by which thread it was called, and then exits."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def __call__(self, *_: object, **__: object) -> NoReturn:
        self.threads.append(threading.current_thread())
        sys.exit("nobody else has asked for this")

    @property
    def was_called_elsewhere(self) -> bool:
        return bool(self.threads) and threading.current_thread() not in self.threads


@pytest.fixture
def proxy(nats_server: NatsServer) -> Iterator[Proxy]:
    with Proxy(nats_server.port) as made:
        yield made


@pytest.fixture
def through_proxy(make_pubsub: MakePubsub, proxy: Proxy) -> NatsPubsub:
    """An extension that is connected by way of the proxy, which counts the connections."""
    pubsub = make_pubsub(urls=proxy.url, breaker_threshold=0)
    pubsub.publish("first", {})
    return pubsub


@pytest.fixture
def lives_on(through_proxy: NatsPubsub, proxy: Proxy) -> Iterator[Callable[[], None]]:
    """Check, when called and at the end, that the first thread and connection still serve."""
    broker: Any = through_proxy.state().broker()
    loop, before = broker._session.loop, threading.active_count()

    def check() -> None:
        receipt = through_proxy.publish("next", {}, timeout=5)
        assert receipt.event_id in event_ids(stored(through_proxy))
        assert broker._session.loop is loop
        assert loop.is_alive
        assert threading.active_count() == before
        assert proxy.accepted == 1

    yield check
    check()


def test_receiver_that_exits_harms_no_direct_publish(
    through_proxy: NatsPubsub, lives_on: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    leave = Leaver()
    with message_published.connected_to(leave, through_proxy.state().app):
        receipts = [through_proxy.publish("a", {"n": n}) for n in range(3)]
        lives_on()

    assert {receipt.status for receipt in receipts} == {"stored"}
    assert len(leave.threads) == 4
    assert caplog.text.count("a receiver of the signal 'message-published' failed") == 4
    assert "nobody else has asked for this" in caplog.text


def test_receiver_that_exits_harms_no_publish_that_nobody_waits_for(
    through_proxy: NatsPubsub, lives_on: Callable[[], None]
) -> None:
    leave = Leaver()
    with message_published.connected_to(leave, through_proxy.state().app):
        futures = [through_proxy.publish_nowait("a", {"n": n}) for n in range(20)]
        assert {future.result(10).status for future in futures} == {"stored"}
        eventually(lambda: len(leave.threads) == 20)

    assert leave.was_called_elsewhere
    lives_on()


def test_callback_of_a_future_that_exits_harms_no_other_publish(
    through_proxy: NatsPubsub,
    proxy: Proxy,
    lives_on: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    leave = Leaver()
    proxy.hold()  # so that none has its answer before it has its callback
    futures = [through_proxy.publish_nowait("a", {"n": n}) for n in range(20)]
    for future in futures[::2]:
        future.add_done_callback(leave)
    proxy.release()

    assert {future.result(10).status for future in futures} == {"stored"}
    eventually(lambda: len(leave.threads) == 10)
    assert leave.was_called_elsewhere
    lives_on()
    assert caplog.text.count("a callback of a publish failed") == 10


def test_callback_of_a_publish_that_ran_out_of_time_may_exit_too(
    through_proxy: NatsPubsub, proxy: Proxy, lives_on: Callable[[], None]
) -> None:
    leave = Leaver()
    proxy.hold()
    futures = [through_proxy.publish_nowait("a", {"n": n}, timeout=0.3) for n in range(20)]
    for future in futures[::2]:
        future.add_done_callback(leave)

    assert {type(future.exception(10)) for future in futures} == {PublishError}
    eventually(lambda: len(leave.threads) == 10)
    assert leave.was_called_elsewhere
    proxy.release()
    lives_on()


@pytest.fixture(params=["taken from the socket", "as nats-py gives it"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How messages arrive; the second is that of a websocket."""
    if request.param != "taken from the socket":
        monkeypatch.setattr(nats_py, "reader_of", lambda transport: None)


def test_listener_that_exits_hears_the_next_message_too(
    way: None,
    through_proxy: NatsPubsub,
    lives_on: Callable[[], None],
    env: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    leave, heard = Leaver(), list[Message]()
    broker = through_proxy.state().broker()
    for callback in (leave, heard.append):
        broker.listen(f"{env}.core", callback)
    for n in range(1, 4):
        broker.send(f"{env}.core", b"%d" % n)
        eventually(lambda n=n: len(heard) == len(leave.threads) == n)
        lives_on()

    assert leave.was_called_elsewhere
    assert [message.data for message in heard] == [b"1", b"2", b"3"]
    assert caplog.text.count("could not be passed on") == 3
    assert "nobody else has asked for this" in caplog.text


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_whatever_else_exits_in_it_the_thread_goes_on(
    through_proxy: NatsPubsub,
    lives_on: Callable[[], None],
    error: type[BaseException],
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker: Any = through_proxy.state().broker()

    def leave() -> None:
        raise error

    with caplog.at_level(logging.ERROR, "flask_natspubsub.broker"):
        for n in range(1, 4):
            broker._session.loop.loop.call_soon_threadsafe(leave)
            eventually(lambda n=n: caplog.text.count("tried to end the thread") == n)
            lives_on()
