"""Bytes that nobody should send: each ends among the dead letters, and the worker goes on."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import string
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from flask_natspubsub.messages.plain import MAX_DEPTH
from tests.support.waiting import eventually

pytestmark = pytest.mark.real_server

BODIES = 1000


@dataclass
class Order:
    n: int


CHARACTERS = string.printable + "äöü漢字😀\u200b\ufeff\x00"


def _text(source, size):
    return "".join(source.choice(CHARACTERS) for _ in range(size))


def _value(source, depth=0):
    """Some JSON value, hostile now and then."""
    kind = source.randrange(10 if depth < 4 else 6)
    if kind == 0:
        return source.choice([None, True, False])
    if kind == 1:
        return source.choice([0, -1, 1.5, 1e308, -1e-320, 2**63, -(2**64), 10**200])
    if kind < 6:
        return _text(source, source.choice([0, 1, 10, 300]))
    if kind < 8:
        return [_value(source, depth + 1) for _ in range(source.randrange(4))]
    return {_text(source, 5): _value(source, depth + 1) for _ in range(source.randrange(4))}


def _random_bytes(source):
    return source.randbytes(source.choice([0, 1, 2, 10, 100, 5000]))


def _truncated(source):
    whole = json.dumps({"event_id": "e", "message": {"n": 1, "x": _value(source)}}).encode()
    return whole[: source.randrange(1, len(whole))]


def _flipped(source):
    whole = bytearray(json.dumps({"event_id": "e", "message": {"x": _text(source, 20)}}).encode())
    for _ in range(source.randrange(1, 4)):
        whole[source.randrange(len(whole))] = source.randrange(256)
    return bytes(whole)


def _no_envelope(source):
    return json.dumps(source.choice([1, "x", None, [], [{}], True, _text(source, 30)])).encode()


def _no_message(source):
    body = source.choice([None, 1, "x", [], True, [{"n": 1}]])
    return json.dumps({"event_id": "e", "topic": "t", "message": body}).encode()


def _deep(source):
    levels = source.choice([MAX_DEPTH + 1, 500, 5_000, 100_000])
    opening, closing = source.choice([(b"[", b"]"), (b'{"a":', b"}")])
    inner = opening * levels + b"1" + (closing * levels if source.random() < 0.8 else b"")
    return b'{"message":{"n":1,"x":' + inner + b"}}"


def _numbers(source):
    number = source.choice(["1e400", "-1e9999", "NaN", "Infinity", "01", "1.", "+1", "0x10", "1_0"])
    return b'{"message":{"n":1,"x":%s}}' % number.encode()


def _surrogates(source):
    escape = source.choice([r"\ud800", r"\udfff", r"\ud800A", r"\udc00\ud800", r"\uZZZZ", r"\x41"])
    return b'{"event_id":"%s","message":{"n":1}}' % escape.encode()


def _bad_utf8(source):
    piece = source.choice([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x80"])
    return b'{"message":{"n":1,"x":"' + piece + b'"}}'


def _wrong_schema(source):
    return json.dumps({"message": {"n": source.choice(["1", None, 1.5, [], {}, True])}}).encode()


def _hostile_envelope(source):
    """The message is fine; all around it is not. To be handled."""
    keys = ["event_id", "topic", "trace_id", "producer", "occurred_at", "correlation_id", "extra"]
    around = {key: _value(source) for key in keys}
    return json.dumps({**around, "message": {"n": -1}}).encode("utf-8", "surrogatepass")


#: What makes a body, and whether the handler must see it.
MAKERS = [
    (_random_bytes, False),
    (_truncated, False),
    (_flipped, None),  # may hit a text, and be a message still
    (_no_envelope, False),
    (_no_message, False),
    (_deep, False),
    (_numbers, False),
    (_surrogates, False),
    (_bad_utf8, False),
    (_wrong_schema, False),
    (_hostile_envelope, True),
]


def test_a_thousand_hostile_bodies(shop):
    source = random.Random(20250102)
    chosen = [MAKERS[index % len(MAKERS)] for index in range(BODIES)]
    bodies = [maker(source) for maker, _ in chosen]
    seen = {}

    @shop.subscriber("order.created", name="mailer")
    def handle(message: dict, context):
        if type(message.get("n", 0)) is not int:
            raise TypeError("n must be an integer")
        seen[context.sequence] = context.raw

    handle_typed = {}

    @shop.subscriber("order.created", name="typed")
    def typed(message: Order, context):
        handle_typed[context.sequence] = message.n

    shop.work(concurrency=4)
    shop.publish_by_hand(*[("order.created", body, None) for body in bodies])
    shop.wait_until_settled("mailer", "typed", timeout=60)

    letters = {}
    for letter in shop.dead_letters:
        letters.setdefault(letter.subscriber, {})[letter.original_sequence] = letter
    assert set(letters) == {"mailer", "typed"}
    for name, handled in (("mailer", seen), ("typed", handle_typed)):
        for sequence, (body, (maker, wanted)) in enumerate(zip(bodies, chosen, strict=True), 1):
            what = (maker.__name__, body[:200])
            letter = letters[name].get(sequence)
            assert (sequence in handled) is (letter is None), what
            if letter is not None:
                assert letter.data == body, what
                assert letter.deliveries == 1 or letter.reason == "handler_error", what
            if wanted is not None:
                assert (letter is None) is wanted, what
    assert {letter.reason for letter in letters["typed"].values()} == {"malformed", "schema"}

    shop.pubsub.publish("order.created", {"n": 4711})
    eventually(lambda: 4711 in handle_typed.values())
    shop.wait_until_settled("mailer", "typed")


HEADERS = [
    b"no colon at all",
    b": no name",
    b"::",
    b" leading: space",
    b"name with space: x",
    b"x-bad-utf8: \xff\xfe\xc0",
    b"x-nul: a\x00b",
    b"x-cr: a\rb: c",
    b"x-lf: a\nb: c",
    b"x-tab: \t\t",
    b"x-long: " + b"x" * 20_000,
    b"x" * 5000 + b": y",
    "x-unicode-\u00e4: \u6f22\U0001f600".encode(),
    b"x-twice: 1\r\nx-twice: 2",
    b"Status: 503",
    b"Status: 100\r\nDescription: FlowControl Request",
    b"Nats-Msg-Id: @" + b"y" * 3000,
    b"nats-msg-id: ../../@",
    b"Nats-Expected-Stream: ",
    b"trace_id: \x1b[31mred",
    b"trace_id: " + b"t" * 10_000,
    b"traceparent: 00-zz-zz-zz",
    b"topic: >",
    b"topic: *.*.*",
    b"x-dead-letter: true",
    b"x-dlq-reason: lies",
    b"x-dlq-context: {",
    b"x-original-subject: other",
    b"x-original-sequence: 9e9",
    b"x-replay-count: many",
    b"x-dlq-body-omitted: true",
]


def test_hostile_headers(shop):
    """Good and bad bodies under headers that no client library would send."""
    seen = {}

    @shop.subscriber("order.created", name="mailer")
    def handle(message: Order, context):
        seen[context.sequence] = message.n
        shop.pubsub.publish("order.seen", {"n": message.n})  # inherits what it can

    follower = shop.record("order.seen", name="follower")
    shop.work(concurrency=4)
    shop.state.broker().connect(10)
    bodies = [b'{"message":{"n":1}}', b"broken", b""]
    frames = [
        (header.replace(b"@", str(number).encode()), body)
        for header in HEADERS
        for number, body in enumerate(bodies)
    ]
    subject = shop.subject("order.created")
    asyncio.run(_publish_raw(shop.settings.urls[0], subject, frames))
    broker, stream = shop.state.broker(), shop.settings.stream
    eventually(lambda: len(list(broker.messages(stream, subject))) == len(frames))
    shop.wait_until_settled("mailer", "follower")

    letters = {letter.original_sequence: letter for letter in shop.dead_letters}
    good = [body == bodies[0] for _, body in frames]
    assert len(seen) == sum(good) == len(follower.calls)
    assert len(letters) == len(frames) - sum(good)
    for letter in letters.values():
        assert (letter.reason, letter.subscriber) == ("malformed", "mailer")
        assert letter.original_subject == subject
        assert (letter.data, letter.body_omitted) in [(b"broken", False), (b"", False)]
    assert sum(letter.data == b"broken" for letter in letters.values()) == len(HEADERS)


async def _publish_raw(url, subject, frames):
    """Write HPUB frames to the socket; the server stores whatever headers they have."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    await reader.readline()
    writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
    for header, body in frames:
        block = b"NATS/1.0\r\n" + header + b"\r\n\r\n"
        line = f"HPUB {subject} {len(block)} {len(block) + len(body)}\r\n".encode()
        writer.write(line + block + body + b"\r\n")
    writer.write(b"PING\r\n")
    answer = await reader.readline()
    assert answer == b"PONG\r\n", answer
    writer.close()
    await writer.wait_closed()


def test_hostile_dead_letters_of_others_are_listed_and_harmless(shop):
    shop.record("order.created")
    shop.work()
    bodies = [
        b"",
        b"\xff",
        b"[]",
        json.dumps({"original_subject": 5, "raw_base64": "!"}).encode(),
        json.dumps({"original_subject": {}, "deliveries": [], "error": {"a": 1}}).encode(),
        json.dumps(
            {
                "original_subject": "a.b.c",
                "raw_base64": base64.b64encode(b"\x00").decode(),
                "trace_id": {"x": 1},
                "event_id": [],
                "subscriber": 7,
                "sequence": "x",
            }
        ).encode(),
    ]
    headers = [
        None,
        {"x-dlq-context": '{"event_id":{},"original_subject":[],"deliveries":"x"}'},
        {"x-deliveries": "-1", "x-original-sequence": "1.5", "x-dead-letter": "?"},
    ]
    shop.publish_by_hand(*[("dlq", body, block) for body in bodies for block in headers])

    letters = shop.wait_for_dead_letters(len(bodies) * len(headers))
    for letter in letters:
        assert isinstance(letter.event_id, str)
        assert isinstance(letter.original_subject, str)
        assert letter.trace_id is None or isinstance(letter.trace_id, str)
        assert isinstance(letter.deliveries, int)
        assert shop.pubsub.dead_letters.get(letter.id) == letter
        assert shop.pubsub.dead_letters.discard(letter)
    assert shop.dead_letters == []
