"""Publishing to a real nats-server: what is on the wire, what comes back, what goes wrong."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import count as numbers
from typing import Any

import pytest

from flask_natspubsub import (
    InvalidTopic,
    NatsPubsub,
    NoStreamForSubject,
    NotConnected,
    PayloadTooLarge,
    PublishDenied,
    PublishError,
    PublishReceipt,
    message_published,
)
from flask_natspubsub.brokers.jetstream import publish_window
from tests.conftest import MakePubsub
from tests.support.proxy import LoseAcks, Proxy
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

from .helpers import Outcome, api, at_most, count, event_ids, frames, seen_by_another_client, stored

pytestmark = pytest.mark.real_server

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


# --- on the wire


def test_another_client_sees_the_message_of_the_wire_format(
    pubsub: NatsPubsub, nats_server: NatsServer, env: str
) -> None:
    pubsub.state().broker().connect(5)

    def publish() -> None:
        pubsub.publish(
            "Order Placed/EU#1",
            {"order_id": 42, "größe": "L", "gift": None},
            event_id="22222222-2222-4222-8222-222222222222",
            message_type="OrderPlaced",
            trace_id="trace-abc",
            occurred_at=dt.datetime(2025, 1, 2, 3, 4, 5, 678_000, dt.UTC),
            headers={"tenant": "größe"},
        )

    (message,) = seen_by_another_client(nats_server.url, f"{env}.>", publish)

    assert message.subject == f"{env}.shop.order_placed_eu_1"
    assert (
        message.data
        == (
            '{"event_id":"22222222-2222-4222-8222-222222222222","schema_version":1,'
            '"topic":"Order Placed/EU#1","message_type":"OrderPlaced","producer":"shop",'
            '"occurred_at":"2025-01-02T03:04:05.678Z","trace_id":"trace-abc",'
            '"message":{"order_id":42,"größe":"L","gift":null}}'
        ).encode()
    )
    assert list((message.headers or {}).items()) == [
        ("topic", "Order Placed/EU#1"),
        ("trace_id", "trace-abc"),
        ("Nats-Msg-Id", "22222222-2222-4222-8222-222222222222"),
        ("tenant", "größe"),
    ]


def test_the_bytes_that_leave_the_process(
    make_pubsub: MakePubsub, nats_server: NatsServer, env: str
) -> None:
    with Proxy(nats_server.port) as proxy:
        pubsub = make_pubsub(urls=proxy.url)
        app = pubsub.state().app

        @app.post("/")
        def view() -> str:
            pubsub.publish_event("shop", "order", "paid", {"id": 7}, event_id="e1")
            return ""

        app.test_client().post("/", headers={"traceparent": PARENT})

        ((subject, headers, payload),) = frames(bytes(proxy.from_clients))

    assert subject == f"{env}.shop.shop.order.paid"
    assert headers == (
        b"NATS/1.0\r\n"
        b"topic: shop.order.paid\r\n"
        b"trace_id: 4bf92f3577b34da6a3ce929d0e0e4736\r\n"
        b"Nats-Msg-Id: e1\r\n"
        b"traceparent: " + PARENT.encode() + b"\r\n\r\n"
    )
    sent = json.loads(payload)
    assert list(sent) == [
        "event_id",
        "schema_version",
        "topic",
        "producer",
        "occurred_at",
        "trace_id",
        "message",
        "domain",
        "resource",
        "action",
        "resource_id",
    ]
    assert sent["resource_id"] == 7


# --- receipts


def test_a_receipt_says_what_the_server_says(
    pubsub: NatsPubsub, nats_server: NatsServer, env: str
) -> None:
    first = pubsub.publish("order.created", {"n": 1}, event_id="e1")
    second = pubsub.publish("order.created", {"n": 2})
    again = pubsub.publish("order.created", {"n": 1}, event_id="e1")

    assert first == PublishReceipt(
        "e1",
        "order.created",
        f"{env}.shop.order.created",
        f"{env}-events-stream",
        1,
        False,
        "stored",
    )
    assert (second.sequence, second.duplicate) == (2, False)
    assert (again.sequence, again.duplicate) == (1, True)
    info = api(nats_server.url, f"STREAM.INFO.{env}-events-stream")
    assert info["state"]["messages"] == 2
    assert info["config"]["subjects"] == [f"{env}.events.>", f"{env}.shop.>"]


# --- what the server refuses


def test_what_is_too_large_is_refused_before_it_is_sent(make_pubsub: MakePubsub, env: str) -> None:
    with NatsServer("max_payload: 4096") as server, Proxy(server.port) as proxy:
        pubsub = make_pubsub(urls=proxy.url)
        pubsub.publish("a", {"x": ""}, event_id="e0")
        ((_, headers, payload),) = frames(bytes(proxy.from_clients))
        room = 4096 - len(headers) - len(payload)

        pubsub.publish("a", {"x": "y" * room}, event_id="e1")
        with pytest.raises(PayloadTooLarge, match=r"4,097 bytes.*4,096") as caught:
            pubsub.publish("a", {"x": "y" * (room + 1)}, event_id="zz")

        assert (caught.value.size, caught.value.limit) == (4097, 4096)
        assert caught.value.outcome == "not_sent"
        assert b"zz" not in proxy.from_clients
        assert event_ids(stored(pubsub)) == ["e0", "e1"]


def test_without_a_stream_the_error_names_the_subject_and_the_remedy(
    make_pubsub: MakePubsub, nats_server: NatsServer, env: str
) -> None:
    pubsub = make_pubsub(urls=nats_server.url, auto_setup=False)

    with at_most(3), pytest.raises(NoStreamForSubject, match=r"flask natspubsub setup") as caught:
        pubsub.publish("order.created", {})

    assert f"{env}.shop.order.created" in str(caught.value)
    assert caught.value.outcome == "not_sent"


def test_a_stream_that_was_there_before_is_waited_for(
    make_pubsub: MakePubsub, nats_server: NatsServer, env: str
) -> None:
    """As while it elects its leader: longer than the pauses in which nobody answers."""
    maker = make_pubsub(urls=nats_server.url)
    pubsub = make_pubsub(urls=nats_server.url, auto_setup=False)
    maker.publish("a", {})
    pubsub.publish("a", {})
    api(nats_server.url, f"STREAM.DELETE.{env}-events-stream")

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(pubsub.publish, "a", {}, timeout=20)
        with pytest.raises(TimeoutError):
            future.result(2 * sum(publish_window.NO_RESPONDERS_WAITS))
        maker.state().broker().setup(maker.state().streams())
        assert future.result(10).sequence == 1

    api(nats_server.url, f"STREAM.DELETE.{env}-events-stream")
    with at_most(3), pytest.raises(NoStreamForSubject, match=r"flask natspubsub setup"):
        pubsub.publish("a", {}, timeout=1)


def test_a_stream_that_somebody_deleted_is_made_anew(
    pubsub: NatsPubsub, nats_server: NatsServer, env: str
) -> None:
    pubsub.publish("a", {})
    api(nats_server.url, f"STREAM.DELETE.{env}-events-stream")

    assert pubsub.publish("a", {}).sequence == 1


RESTRICTED = """
authorization {
  users = [
    { user: admin, password: admin }
    { user: shop, password: pw, permissions: {
        publish: { allow: [">"], deny: ["*.SHOP.secret.>"] } } }
    { user: poor, password: pw, permissions: { publish: ["*.shop.>"], subscribe: ["_INBOX.>"] } }
  ]
}
"""


def test_a_denied_subject_is_an_error_of_the_call_within_two_seconds(
    make_pubsub: MakePubsub, env: str
) -> None:
    with NatsServer(RESTRICTED) as server:
        pubsub = make_pubsub("SHOP", urls=server.url, user="shop", password="pw")
        pubsub.publish("order.created", {})

        with at_most(2), pytest.raises(PublishDenied) as caught:
            pubsub.publish("secret.plan", {})

        assert repr(f"{env}.SHOP.secret.plan") in str(caught.value)
        assert caught.value.outcome == "not_sent"
        assert not caught.value.temporary
        assert pubsub.publish("order.created", {}).sequence == 2


def test_a_user_who_may_only_publish_can_publish(
    make_pubsub: MakePubsub, env: str, caplog: pytest.LogCaptureFixture
) -> None:
    with NatsServer(RESTRICTED) as server:
        admin = make_pubsub(urls=server.url, user="admin", password="admin")
        admin.publish("order.created", {})
        pubsub = make_pubsub(urls=server.url, user="poor", password="pw")

        with at_most(2):
            assert pubsub.publish("order.created", {}).sequence == 2

    assert "the streams could not be set up" in caplog.text
    assert f"STREAM.INFO.{env}-events-stream" in caplog.text


def test_a_full_stream_that_keeps_the_old_is_a_passing_error(
    make_pubsub: MakePubsub, nats_server: NatsServer
) -> None:
    pubsub = make_pubsub(urls=nats_server.url, stream_config={"max_msgs": 2, "discard": "new"})
    pubsub.publish_many([("a", {}), ("b", {})])

    with at_most(2), pytest.raises(PublishError, match="maximum messages exceeded") as caught:
        pubsub.publish("c", {}, event_id="e1")

    assert type(caught.value) is PublishError
    assert caught.value.temporary
    assert caught.value.outcome == "not_sent"
    broker = pubsub.state().broker()
    broker.delete_message(pubsub.state().settings.stream, 1)
    assert pubsub.publish("c", {}, event_id="e1").sequence == 3


# --- from anywhere


def test_from_a_view(pubsub: NatsPubsub) -> None:
    app = pubsub.state().app
    app.add_url_rule("/", view_func=lambda: pubsub.publish("a", {}).event_id, methods=["POST"])

    event_id = app.test_client().post("/", headers={"X-Trace-ID": "t1"}).text

    (message,) = stored(pubsub)
    assert message.headers["Nats-Msg-Id"] == event_id
    assert message.headers["trace_id"] == "t1"


def test_from_an_async_view(pubsub: NatsPubsub) -> None:
    app = pubsub.state().app

    @app.post("/awaits")
    async def awaits() -> str:
        receipts = await asyncio.gather(*(pubsub.publish_async("a", {"n": n}) for n in range(5)))
        return ",".join(str(receipt.sequence) for receipt in receipts)

    @app.post("/blocks")
    async def blocks() -> str:
        return str(pubsub.publish("a", {}).sequence)

    assert app.test_client().post("/awaits").text == "1,2,3,4,5"
    assert app.test_client().post("/blocks").text == "6"
    assert count(pubsub) == 6


def test_in_an_async_view_the_loop_runs_on_while_a_publish_waits(
    make_pubsub: MakePubsub, nats_server: NatsServer
) -> None:
    with Proxy(nats_server.port) as proxy:
        pubsub = make_pubsub(urls=proxy.url)
        pubsub.state().broker().connect(5)
        proxy.delay = 0.2

        async def main() -> int:
            task = asyncio.ensure_future(pubsub.publish_async("a", {}))
            for turns in numbers():
                await asyncio.sleep(0.01)
                if task.done():
                    await task
                    return turns
            raise AssertionError

        assert asyncio.run(main()) > 5


def test_from_a_plain_thread_without_a_context(pubsub: NatsPubsub) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(pubsub.publish, "a", {}).result(10).sequence == 1


def test_from_a_script_that_just_ends(
    nats_server: NatsServer, env: str, pubsub: NatsPubsub
) -> None:
    script = f"""
from flask import Flask
from flask_natspubsub import NatsPubsub
app = Flask("shop")
app.config.update(NATSPUBSUB_URLS={nats_server.url!r}, NATSPUBSUB_ENV={env!r})
pubsub = NatsPubsub(app)
with app.app_context():
    print(pubsub.publish("a", {{}}).sequence)
for number in range(100):
    pubsub.publish_nowait("a", {{}})
"""
    with at_most(15):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
    assert count(pubsub) == 101


def test_from_flask_shell(
    nats_server: NatsServer, env: str, pubsub: NatsPubsub, tmp_path: Any
) -> None:
    (tmp_path / "shop.py").write_text(
        "from flask import Flask\n"
        "from flask_natspubsub import NatsPubsub\n"
        "app = Flask('shop')\n"
        "app.config.from_prefixed_env()\n"
        "NatsPubsub(app)\n"
    )

    done = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "shop", "shell"],
        input="print('sequence', pubsub.publish('a', {}).sequence)\n",
        env={"FLASK_NATSPUBSUB_URLS": nats_server.url, "FLASK_NATSPUBSUB_ENV": env},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert "sequence 1" in done.stdout
    assert count(pubsub) == 1


def test_from_32_threads_at_once(pubsub: NatsPubsub) -> None:
    barrier = threading.Barrier(32)

    def publish_some(thread: int) -> list[PublishReceipt]:
        barrier.wait(10)
        return [pubsub.publish("a", {}, event_id=f"{thread}-{n}") for n in range(30)]

    with ThreadPoolExecutor(32) as pool:
        receipts = [r for some in pool.map(publish_some, range(32)) for r in some]

    assert sorted(receipt.sequence or 0 for receipt in receipts) == list(range(1, 961))
    at = {receipt.sequence: receipt.event_id for receipt in receipts}
    assert {m.sequence: m.headers["Nats-Msg-Id"] for m in stored(pubsub)} == at


def test_publish_many_stores_10000_messages_in_order_with_one_wait(pubsub: NatsPubsub) -> None:
    with at_most(10):
        receipts = pubsub.publish_many(("a", {"n": n}) for n in range(10_000))

    assert [receipt.sequence for receipt in receipts] == list(range(1, 10_001))
    assert count(pubsub) == 10_000
    broker, stream = pubsub.state().broker(), pubsub.state().settings.stream
    for sequence in (1, 5_000, 10_000):
        message = broker.get_message(stream, sequence)
        assert message is not None
        assert json.loads(message.data)["message"] == {"n": sequence - 1}


# --- a slow server


def test_a_slow_server_makes_publishers_wait_and_memory_not_grow(
    make_pubsub: MakePubsub, nats_server: NatsServer
) -> None:
    with Proxy(nats_server.port) as proxy:
        pubsub = make_pubsub(urls=proxy.url, publish_in_flight=50, publish_queue=100)
        broker: Any = pubsub.state().broker()
        broker.connect(5)
        window = broker._session.window
        proxy.delay = 0.1
        most = Counter[str]()

        def publish_some(thread: int) -> list[Any]:
            futures = []
            for n in range(75):
                futures.append(pubsub.publish_nowait("a", {}, event_id=f"{thread}-{n}", timeout=20))
                most["in flight"] = max(most["in flight"], len(window._in_flight))
                most["queued"] = max(most["queued"], window._queued)
            return futures

        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            futures = [future for some in pool.map(publish_some, range(8)) for future in some]
        handing_over = time.monotonic() - began
        wait(futures, 20)

    assert {future.result(0).event_id for future in futures} == {
        f"{thread}-{n}" for thread in range(8) for n in range(75)
    }
    assert most["in flight"] <= 50
    assert most["queued"] <= 100
    # 600 messages, 50 in 0.2 s: handing them over has to wait for all but 150 of them.
    assert handing_over > 1.0


def test_what_is_queued_is_bounded_in_bytes_too(
    make_pubsub: MakePubsub, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish_window, "IN_FLIGHT_BYTES", 1)
    with Proxy(nats_server.port) as proxy:
        pubsub = make_pubsub(urls=proxy.url, publish_queue_bytes=100_000)
        pubsub.state().broker().connect(5)
        proxy.hold()
        large = {"x": "y" * 60_000}
        futures = [pubsub.publish_nowait("a", large, timeout=20) for _ in range(3)]

        with at_most(1), pytest.raises(PublishError, match="waiting to be sent already"):
            pubsub.publish("a", large, timeout=0.5)

        proxy.release()
        assert [future.result(10).sequence for future in futures] == [1, 2, 3]
        assert pubsub.publish("a", large).sequence == 4


# --- a server that does not answer


def test_without_an_answer_the_outcome_is_unknown_and_a_second_try_is_safe(
    make_pubsub: MakePubsub, nats_server: NatsServer
) -> None:
    with Proxy(nats_server.port) as proxy:
        losing = threading.Event()
        proxy.make_filter = lambda: LoseAcks(losing.is_set)
        pubsub = make_pubsub(urls=proxy.url)
        pubsub.publish("a", {})
        losing.set()

        with at_most(1.5), pytest.raises(PublishError, match="may or may not be stored") as caught:
            pubsub.publish("a", {}, event_id="e1", timeout=1)
        assert caught.value.outcome == "unknown"
        assert "event_id" in caught.value.fix

        losing.clear()
        assert pubsub.publish("a", {}, event_id="e1").duplicate
        assert count(pubsub) == 2


def test_a_connection_that_hangs_keeps_nobody_longer_than_the_timeout(
    make_pubsub: MakePubsub, nats_server: NatsServer
) -> None:
    with Proxy(nats_server.port) as proxy:
        pubsub = make_pubsub(urls=proxy.url, publish_timeout=1, breaker_threshold=0)
        pubsub.publish("a", {})
        proxy.hold()

        with ThreadPoolExecutor(16) as pool:
            outcomes = list(pool.map(lambda n: Outcome(pubsub, f"e{n}", 1), range(16)))

        assert all(outcome.seconds <= 1.5 for outcome in outcomes)
        assert {outcome.error.outcome for outcome in outcomes if outcome.error} == {"unknown"}
        assert not any(outcome.receipt for outcome in outcomes)
        proxy.release()


def test_what_was_in_flight_when_the_connection_broke_is_sent_again_and_stored_once(
    make_pubsub: MakePubsub, nats_server: NatsServer
) -> None:
    with Proxy(nats_server.port) as proxy:
        losing = threading.Event()
        proxy.make_filter = lambda: LoseAcks(losing.is_set)
        pubsub = make_pubsub(urls=proxy.url)
        pubsub.publish("a", {}, event_id="e0")
        losing.set()
        futures = [pubsub.publish_nowait("a", {}, event_id=f"e{n}") for n in range(1, 201)]
        eventually(lambda: count(pubsub) == 201)  # stored, and nobody knows
        assert not any(future.done() for future in futures)

        losing.clear()
        proxy.cut()

        receipts = [future.result(6) for future in futures]
        assert all(receipt.duplicate for receipt in receipts)
        assert [receipt.sequence for receipt in receipts] == list(range(2, 202))
        assert event_ids(stored(pubsub)) == [f"e{n}" for n in range(201)]


def test_links_that_break_and_lose_answers_lose_no_message(
    make_pubsub: MakePubsub, nats_server: NatsServer
) -> None:
    with Proxy(nats_server.port) as proxy:
        acks = numbers()
        proxy.make_filter = lambda: LoseAcks(lambda: next(acks) % 10 == 3)
        pubsub = make_pubsub(urls=proxy.url, breaker_threshold=0)
        receipts: list[PublishReceipt] = []

        def publish_some(thread: int) -> None:
            for n in range(25):
                event_id = f"{thread}-{n}"
                while (outcome := Outcome(pubsub, event_id, 0.5)).receipt is None:
                    assert outcome.seconds <= 1.0
                receipts.append(outcome.receipt)

        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(publish_some, thread) for thread in range(8)]
            for _ in range(3):
                before = len(receipts)
                eventually(lambda before=before: len(receipts) > before + 20)  # type: ignore[misc]
                proxy.cut()
            for one in running:
                one.result(30)

        assert len(receipts) == 200
        ids = event_ids(stored(pubsub))
        assert len(ids) == len(set(ids)) == 200
        assert {m.sequence: m.headers["Nats-Msg-Id"] for m in stored(pubsub)} == {
            receipt.sequence: receipt.event_id for receipt in receipts
        }


# --- a server that goes and comes back


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_publishing_while_the_server_is_restarted(make_pubsub: MakePubsub, how: str) -> None:
    with NatsServer() as server:
        pubsub = make_pubsub(urls=server.url, breaker_threshold=0)
        pubsub.publish("a", {}, event_id="first")
        stop = threading.Event()
        outcomes: list[Outcome] = []

        def publish_on(thread: int) -> None:
            for n in numbers():
                if stop.is_set():
                    return
                outcomes.append(Outcome(pubsub, f"{thread}-{n}", 6))

        def progress() -> bool:
            before = len(outcomes)
            return bool(eventually(lambda: len(outcomes) > before + 50, 15))

        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(publish_on, thread) for thread in range(8)]
            try:
                for _ in range(2):
                    progress()
                    getattr(server, how)()
                    server.start()
                progress()
            finally:
                stop.set()
            for one in running:
                one.result(10)

        slowest = max(outcome.seconds for outcome in outcomes)
        assert slowest <= 6.5
        ids = event_ids(stored(pubsub))
        assert len(ids) == len(set(ids))
        fine = {outcome.event_id for outcome in outcomes if outcome.receipt}
        assert fine <= set(ids)
        # The server was away for less than the timeout: every message got through.
        assert [outcome.error for outcome in outcomes if outcome.error] == []


def test_while_the_server_is_away_each_call_ends_in_time_and_says_so(
    make_pubsub: MakePubsub,
) -> None:
    with NatsServer() as server:
        pubsub = make_pubsub(urls=server.url, breaker_threshold=0)
        pubsub.publish("a", {})
        server.kill()

        with ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(lambda n: Outcome(pubsub, f"e{n}", 1), range(8)))

        assert all(outcome.seconds <= 1.5 for outcome in outcomes)
        assert all(isinstance(outcome.error, NotConnected) for outcome in outcomes)
        server.start()
        eventually(lambda: pubsub.is_connected)
        assert count(pubsub) == 1


def test_nothing_of_a_timed_out_message_is_sent_later(make_pubsub: MakePubsub) -> None:
    with NatsServer() as server:
        pubsub = make_pubsub(urls=server.url)
        pubsub.publish("a", {}, event_id="e0")
        server.stop()
        eventually(lambda: not pubsub.state().broker().is_connected)
        outcome = Outcome(pubsub, "never", 0.3)
        assert outcome.error is not None
        assert outcome.error.outcome == "not_sent"

        server.start()

        assert pubsub.publish("a", {}, event_id="e1").sequence == 2
        assert event_ids(stored(pubsub)) == ["e0", "e1"]


# --- callbacks


def test_a_receiver_in_the_brokers_thread_hears_of_messages_sent_without_waiting(
    pubsub: NatsPubsub,
) -> None:
    heard = []

    def receiver(sender: Any, receipt: PublishReceipt) -> None:
        heard.append(receipt.event_id)

    with message_published.connected_to(receiver):
        futures = [pubsub.publish_nowait("a", {}, event_id=f"e{n}") for n in range(10)]
        wait(futures, 10)
        eventually(lambda: len(heard) == 10)

    assert heard == [f"e{n}" for n in range(10)]


def test_a_receiver_in_the_brokers_thread_that_would_wait_for_itself_is_told_so(
    pubsub: NatsPubsub,
) -> None:
    told: list[str] = []

    def receiver(sender: Any, receipt: PublishReceipt) -> None:
        if receipt.event_id == "first":
            try:
                pubsub.publish("a", {})
            except PublishError as error:
                told.append(str(error))
            pubsub.publish_nowait("a", {}, event_id="second")

    with at_most(4), message_published.connected_to(receiver):
        pubsub.publish_nowait("a", {}, event_id="first").result(10)
        eventually(lambda: count(pubsub) == 2)
        assert "publish_nowait" in told[0]
        assert len(told) == 1


def test_a_bad_topic_needs_no_server(make_pubsub: MakePubsub) -> None:
    pubsub = make_pubsub(urls="nats://192.0.2.1:4222")

    with at_most(0.5), pytest.raises(InvalidTopic):
        pubsub.publish("a..b", {})
