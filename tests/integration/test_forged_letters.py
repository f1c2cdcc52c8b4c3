"""An attacker who may publish as one app forges dead letters and messages; an operator works on.

The server has exactly the permissions of the documentation, and one more user, who only listens.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import random
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from flask import Flask

from flask_natspubsub import NatsPubsub
from flask_natspubsub.cli import natspubsub
from tests.support.secrets import SECRET
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.real_server

CONFIG = Path(__file__).parents[2] / "docs/_static/nats-permissions.conf"
STREAM = "production-events-stream"
LETTERS = 1000
MESSAGES = 1000
GOOD = 100
#: Of the JetStream API, what the commands ask for by themselves.
OWN_API = re.compile(
    rf"\$JS\.API\.(STREAM\.(INFO|MSG\.GET|MSG\.DELETE)\.{STREAM}(-dlq)?"
    rf"|CONSUMER\.(INFO|MSG\.NEXT|CREATE|DURABLE\.CREATE)\.{STREAM}\.shop-[\w-]+"
    rf"|CONSUMER\.LIST\.{STREAM})"
)
ESCAPES = ["\x1b[2J", "\x1b]0;owned\x07", "\u202egnp", "\x9b31m", "\x00", "\x08\x08", "\x7f"]


@pytest.fixture
def guarded() -> Iterator[NatsServer]:
    listener = f"""
    {{ user: listener, password: "{SECRET}",
       permissions: {{ publish: ["_nobody"], subscribe: [">"] }} }}
    """
    text = CONFIG.read_text()
    end = text.rindex("]\n}")
    with pytest.MonkeyPatch.context() as patch:
        for user in ("WEB", "WORKER", "OPERATOR"):
            patch.setenv(f"{user}_PASSWORD", SECRET)
        with NatsServer(text[:end] + listener + text[end:]) as server:
            yield server


class Site:
    """The shop, as one of the users of the documentation runs it."""

    def __init__(self, server: NatsServer, user: str) -> None:
        self.app = Flask("shop")
        self.app.config.update(
            NATSPUBSUB_ENV="production",
            NATSPUBSUB_URLS=server.url,
            NATSPUBSUB_USER=user,
            NATSPUBSUB_PASSWORD=SECRET,
            NATSPUBSUB_REPLY_PREFIX=f"_INBOX_{user}",
            NATSPUBSUB_AUTO_SETUP=False,
            NATSPUBSUB_BACKOFF=[0.01],
            NATSPUBSUB_MAX_DELIVER=2,
        )
        self.pubsub = NatsPubsub(self.app)
        self.seen: list[int] = []

        @self.pubsub.subscriber("order.>", name="mailer")
        def mail(message: dict[str, Any]) -> None:
            self.seen.append(message["good"])

    def run(self, *arguments: str, fails: bool = False) -> Result:
        result = self.app.test_cli_runner().invoke(natspubsub, [*arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), arguments
        assert result.exit_code in ((0, 1) if fails else (0,)), result.output
        assert_printable(result.output)
        return result


def assert_printable(text: str) -> None:
    raw = {char for line in text.split("\n") for char in line if not char.isprintable()}
    assert raw == set()


class Wire:
    """A client without manners: it writes what it is told to the socket."""

    def __init__(self, server: NatsServer, user: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port), 10)
        self._file = self._socket.makefile("rb")
        self._file.readline()
        connect = {"user": user, "pass": SECRET, "verbose": False, "headers": True}
        self._socket.sendall(f"CONNECT {json.dumps(connect)}\r\n".encode())
        self.flush()

    def publish(self, subject: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        block = b""
        if headers:
            lines = [f"{name}: {value}".encode() for name, value in headers.items()]
            block = b"\r\n".join([b"NATS/1.0", *lines, b"", b""])
        head = f"HPUB {subject} {len(block)} {len(block) + len(data)}\r\n"
        if not block:
            head = f"PUB {subject} {len(data)}\r\n"
        self._socket.sendall(head.encode() + block + data + b"\r\n")

    def flush(self) -> None:
        self._socket.sendall(b"PING\r\n")
        while (line := self._file.readline()) != b"PONG\r\n":
            assert line, "the server closed the connection"

    def subscribe_all(self) -> None:
        self._socket.sendall(b"SUB > 1\r\n")
        self.flush()

    def subjects(self) -> Iterator[str]:
        """Yield the subject of each message that arrives, until the socket is closed."""
        while line := self._file.readline():
            words = line.split()
            if words[:1] in ([b"MSG"], [b"HMSG"]):
                self._file.read(int(words[-1]) + 2)
                yield words[1].decode(errors="replace")

    def end(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Spy:
    """Writes down the subject of everything that anybody sends."""

    def __init__(self, server: NatsServer) -> None:
        self._wire = Wire(server, "listener")
        self._wire.subscribe_all()
        self.heard: list[str] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        self.heard.extend(self._wire.subjects())

    def stop(self) -> list[str]:
        self._wire.end()
        self._thread.join(10)
        self._wire.close()
        return self.heard


def outside(subjects: list[str]) -> list[str]:
    """What was sent neither to the app's own subjects nor, by the commands, to the API."""
    apps = ("production.shop.", "production.dlq.shop.", "natspubsub.wakeup.")
    servers = ("_INBOX_", "$JS.ACK.", "$JS.EVENT.ADVISORY.")
    own = [OWN_API.fullmatch(one) or one.startswith((*apps, *servers)) for one in subjects]
    return [one for one, is_own in zip(subjects, own, strict=True) if not is_own]


def targets(dice: random.Random) -> str:
    return dice.choice(
        [
            "production.billing.invoice.paid",
            "staging.shop.order.created",
            f"$JS.API.STREAM.DELETE.{STREAM}",
            f"$JS.API.STREAM.UPDATE.{STREAM}",
            f"$JS.API.STREAM.PURGE.{STREAM}-dlq",
            "$JS.API.CONSUMER.DELETE.x.y",
            "$SYS.REQ.SERVER.PING",
            "production.dlq.shop.mailer",
            "production.shop.dlq",
            "production.shop.order.created 3 3\r\nabc\r\nPUB injected.by.evil 0\r\n\r\n",
            "production.shop.order.\x1b[2J",
            "production.shop.>",
            "production.shop.order.created",
            "_INBOX_operator.abc",
            "",
            "5",
        ]
    )


def forged(dice: random.Random) -> tuple[bytes, dict[str, str]]:
    """One letter that was never a message: in one of the three shapes, with lies in all fields."""
    odd = dice.choice(ESCAPES)
    subject, stream = targets(dice), dice.choice([STREAM, "victim", "a b", f"{STREAM}-dlq", odd])
    values: dict[str, Any] = {
        "event_id": dice.choice(["e1", odd, "", 7, None, "x" * 300, "e\r\nNats-Rollup: all"]),
        "consumer": dice.choice(["mailer", "x\r\nNats-TTL: 1s", None]),
        "original_subject": subject,
        "stream": stream,
        "sequence": dice.choice([1, 0, -1, "1", 10**30, [1]]),
        "reason": f"max{odd}",
        "error": dice.choice([f"E{odd}", {"a": odd}, 5]),
        "deliveries": dice.choice([1, "many", 10**12]),
        "subscriber": dice.choice(["mailer", odd, "nobody", None]),
        "payload": {"message": {"good": odd}},
        "trace_id": odd,
    }
    shape = dice.randrange(3)
    if shape == 0:
        if dice.random() < 0.5:
            values["raw_base64"] = base64.b64encode(dice.randbytes(20)).decode()
        return json.dumps(values).encode(), {}
    if shape == 1:
        return dice.randbytes(10), {"x-dlq-context": json.dumps(values)}
    headers = {
        "x-dead-letter": "true",
        "x-original-subject": subject,
        "x-original-stream": stream,
        "x-original-sequence": str(values["sequence"]),
        "x-event-id": str(values["event_id"]),
        "x-subscriber": str(values["subscriber"]),
        "x-dlq-error": f"E{odd}",
        "x-dlq-reason": odd,
        "x-replay-for": odd,
        "Nats-Msg-Id": f"{dice.random()}",
        **({"x-dlq-body-omitted": "true"} if dice.random() < 0.3 else {}),
    }
    safe = {name: re.sub(r"[\r\n\0]", "?", value) for name, value in headers.items()}
    return b'{"message": {"good": -1}}', safe


def test_forged_letters_send_the_operator_nowhere(guarded: NatsServer) -> None:
    dice = random.Random(7)
    operator = Site(guarded, "operator")
    operator.run("setup")
    web, worker = Wire(guarded, "web"), Wire(guarded, "worker")
    for number in range(LETTERS):
        body, headers = forged(dice)
        if number % 2:
            web.publish("production.shop.dlq", body, headers)
        else:  # the worst: somebody has the worker's password
            name = dice.choice(["mailer", "nobody", "mailer.deeper"])
            worker.publish(f"production.dlq.shop.{name}", body, headers)
    web.flush()
    worker.flush()
    spy = Spy(guarded)

    listed = json.loads(operator.run("dlq", "list", "--json").stdout)
    everything = json.loads(operator.run("dlq", "list", "--peers", "--json").stdout)
    assert {letter["original_stream"] for letter in listed}
    assert len(listed) < len(everything) <= LETTERS
    operator.run("dlq", "list", "--peers")
    for letter in dice.sample(everything, 60):
        operator.run("dlq", "show", letter["id"], fails=True)
        operator.run("dlq", "show", letter["id"], "--json", fails=True)
    operator.run("dlq", "replay", "--all", "--peers", "--yes", fails=True)
    operator.run(
        "dlq", "replay", "--all", "--peers", "--yes", "--force", "--to", "mailer", fails=True
    )
    operator.run("dlq", "discard", "--all", "--yes")
    operator.pubsub.shutdown()

    again = Site(guarded, "operator")
    sent = list(again.pubsub.state().broker().messages(STREAM))
    headers = {name.lower() for message in sent for name in message.headers}
    assert {name for name in headers if name.startswith("nats-")} == {"nats-msg-id"}
    again.pubsub.shutdown()

    heard = spy.stop()
    assert len(heard) > LETTERS  # it has heard the operator at work
    assert outside(heard) == []
    web.close()
    worker.close()
    again = Site(guarded, "operator")
    assert json.loads(again.run("dlq", "list", "--json").stdout) == []
    assert json.loads(again.run("setup", "--dry-run", "--json").stdout)[0]["action"] == "ok"
    again.pubsub.shutdown()


def hostile(dice: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """One message that is none, or lies about itself, on a subject of the app."""
    odd = dice.choice(ESCAPES)
    subject = dice.choice(["order.created", f"order.{odd}".replace("\x00", "?"), "order.a.b.c"])
    body = dice.choice(
        [
            b"not json",
            b"\xff\xfe",
            b"[]",
            json.dumps({"message": {"good": odd}, "event_id": odd, "topic": odd}).encode(),
            json.dumps({"message": odd}).encode(),
            json.dumps({"message": {}, "event_id": f"e{dice.random()}", "producer": odd}).encode(),
        ]
    )
    headers = {
        "x-replay-for": dice.choice([odd, "somebody"]),
        "x-replay-force": "true",
        "topic": odd,
        "traceparent": odd,
        "x-dlq-context": "{}",
    }
    some = dict(dice.sample(sorted(headers.items()), dice.randrange(4)))
    clean = {name: re.sub(r"[\r\n\0]", "?", value) for name, value in some.items()}
    return re.sub(r"[\s\0]", "?", f"production.shop.{subject}"), body, clean


def test_hostile_messages_do_not_harm_a_worker(guarded: NatsServer) -> None:
    dice = random.Random(11)
    operator, working = Site(guarded, "operator"), Site(guarded, "worker")
    operator.run("setup")
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    logger = logging.getLogger("flask_natspubsub")
    logger.addHandler(handler)
    web, spy = Wire(guarded, "web"), Spy(guarded)
    try:
        with working.pubsub.run_worker() as worker:
            for number in range(MESSAGES):
                web.publish(*hostile(dice))
                if number % (MESSAGES // GOOD) == 0:
                    good = {"event_id": f"good-{number}", "message": {"good": number}}
                    web.publish("production.shop.order.created", json.dumps(good).encode())
            web.flush()
            eventually(
                lambda: len({one for one in working.seen if isinstance(one, int)}) == GOOD, 60
            )
            worker.wait_until_idle()
            assert worker.is_healthy
    finally:
        logger.removeHandler(handler)
    operator.run("dlq", "list")
    for site in (operator, working):
        site.pubsub.shutdown()
    assert outside(spy.stop()) == []
    web.close()
    assert out.getvalue().count("\n") > GOOD
    assert_printable(out.getvalue())
