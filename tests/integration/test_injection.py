"""Hostile ids, headers and names through a real nats-server: what arrives is what was allowed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
from typing import Any

import nats
import pytest

from flask_natspubsub import EncodingError, InvalidTopic
from flask_natspubsub.cli.log import _LineFormatter
from flask_natspubsub.observability.tracing import choose_trace_id
from tests.conftest import MakePubsub
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

from .helpers import count, stored

pytestmark = pytest.mark.real_server

SIZE = 1_000 if os.environ.get("TORTURE") else 150
_BREAKING = "\r\n\0\t :.*>-_aZ09é\u2028\x1b\x85\ud800"
_PLAIN = "abcXYZ019-_.:/+=@~!"


def texts(seed: int, size: int = SIZE) -> list[str]:
    """Texts of which about half are harmless, so that both ways are gone."""
    chance = random.Random(seed)
    made = []
    for number in range(size):
        alphabet = _PLAIN if number % 2 else _BREAKING + _PLAIN
        made.append("".join(chance.choices(alphabet, k=chance.randint(1, 24))) + str(number))
    made.append("a\r\nNats-Rollup: all")
    made.append("a\r\n\r\nPUB other 0\r\n\r\n")
    return made


def test_ids_and_headers_arrive_as_they_were_allowed_and_bring_nothing_along(
    make_pubsub: MakePubsub, nats_server: NatsServer, env: str
) -> None:
    pubsub = make_pubsub(urls=nats_server.url)
    hostile = texts(1)
    allowed: list[dict[str, str]] = []

    def publish_all() -> None:
        for number, text in enumerate(hostile):
            fields = {"event_id": f"{number}-{text}", "trace_id": text}
            headers = {"x-note": f"<{text}>", f"x-{text}": "value"}
            for given in ({**fields, "headers": {}}, {"trace_id": "t", "headers": headers}):
                with contextlib.suppress(EncodingError):
                    receipt = pubsub.publish("a", {}, **given)  # type: ignore[arg-type]
                    wanted = {"topic": "a", "Nats-Msg-Id": receipt.event_id}
                    allowed.append({**wanted, "trace_id": given["trace_id"], **given["headers"]})  # type: ignore[dict-item]
        pubsub.publish("a", {}, event_id="last")

    subject, seen = f"{env}.>", []

    async def listen() -> None:
        client = await nats.connect(nats_server.url)
        try:
            subscription = await client.subscribe(subject)
            await client.flush()
            await asyncio.to_thread(publish_all)
            while not seen or seen[-1].headers["Nats-Msg-Id"] != "last":
                seen.append(await subscription.next_msg(timeout=30))
        finally:
            await client.close()

    asyncio.run(listen())

    assert len(allowed) > SIZE / 2
    assert {message.subject for message in seen} == {f"{env}.shop.a"}
    assert [dict(message.headers) for message in seen[:-1]] == allowed
    assert [dict(message.headers) for message in stored(pubsub)[:-1]] == allowed


def test_trace_ids_of_requests_reach_the_receiver_checked_or_replaced(
    make_pubsub: MakePubsub, nats_server: NatsServer, env: str
) -> None:
    pubsub = make_pubsub(urls=nats_server.url)
    app = pubsub.state().app

    @app.post("/")
    def view() -> str:
        return pubsub.publish("a", {}).event_id

    hostile = [text.replace("\r", "").replace("\n", "") for text in texts(2)]
    hostile += ["00-" + "a" * 32 + "-" + "b" * 16 + "-01", "x" * 5_000]
    answers = []
    client = app.test_client()
    for text in hostile:
        # As a server hands them on: the bytes of a header are read as Latin-1.
        header = text.encode("utf-8", "replace").decode("latin-1")
        environ = {"HTTP_X_TRACE_ID": header, "HTTP_TRACEPARENT": header}
        answers.append(client.post("/", environ_overrides=environ).headers["X-Trace-ID"])

    messages = stored(pubsub)
    assert [message.headers["trace_id"] for message in messages] == answers
    assert [json.loads(message.data)["trace_id"] for message in messages] == answers
    assert all(choose_trace_id(answer, None) == answer for answer in answers)
    assert [m.headers["traceparent"] for m in messages if "traceparent" in m.headers] == [
        hostile[-2]
    ]


def test_topics_go_to_no_other_subject(
    make_pubsub: MakePubsub, nats_server: NatsServer, env: str
) -> None:
    pubsub = make_pubsub(urls=nats_server.url)
    sent = 0
    for text in texts(3):
        with contextlib.suppress(InvalidTopic, EncodingError):
            subject = pubsub.publish(text, {}).subject
            assert subject.startswith(f"{env}.shop.")
            sent += 1

    assert sent > SIZE / 4
    assert count(pubsub) == sent
    assert all(message.subject.startswith(f"{env}.shop.") for message in stored(pubsub))


def test_every_log_line_of_a_hostile_message_is_one_line(
    make_pubsub: MakePubsub,
    nats_server: NatsServer,
    env: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pubsub = make_pubsub(urls=nats_server.url, max_deliver=1)
    fake = "x\r\n2026-01-01 ERROR forged \x1b[31m\u2028\x85\x00"
    handled = []

    @pubsub.subscriber("a")
    def fails(message: dict[str, Any], context: Any) -> None:
        handled.append(context.event_id)
        raise ValueError(fake)

    pubsub.setup() if hasattr(pubsub, "setup") else pubsub.publish("other", {})
    names = ("event_id", "topic", "trace_id", "correlation_id", "producer", "message_type")
    bodies: list[Any] = [{**dict.fromkeys(names, fake), "message": {"text": fake}}, fake, {}]

    async def send() -> None:
        client = await nats.connect(nats_server.url)
        try:
            for body in bodies:
                await client.publish(f"{env}.shop.a", json.dumps(body).encode())
            await client.flush()
        finally:
            await client.close()

    caplog.set_level(logging.INFO)
    with pubsub.run_worker():
        asyncio.run(send())
        eventually(lambda: sum("dead_lettered" in m for m in caplog.messages) == len(bodies), 30)

    assert len(handled) == 1
    formatter = _LineFormatter("%(asctime)s %(levelname)-7s %(message)s")
    lines = [formatter.format(record) for record in caplog.records]
    # Of a handler that failed there is a traceback below the line, indented.
    rows = [row for line in lines for row in line.split("\n")]
    assert all(row.isprintable() for row in rows)
    assert all(row.startswith("  ") or "fails #1" in row or "INFO" in row for row in rows), rows
    assert not any(row.lstrip().startswith("2026-01-01") for row in rows)
    assert sum("forged" in row for row in rows) >= 2
