"""The bytes of the NATS client protocol that the hot paths write and read themselves.

Source: the NATS protocol reference (PUB, HPUB) and ADR-4 (headers); the ack subject is
described in ADR-15. Pure functions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

_log = logging.getLogger("flask_natspubsub.broker")

NOT_PASSED_ON = "a message on %r could not be passed on"
HEADER_LINE = "NATS/1.0"
_BLANKS = " \t\n\r\v\f"
_MESSAGES = (b"MSG ", b"HMSG ")
NO_HEADERS: Mapping[str, str] = {}
STATUS = "Status"
DESCRIPTION = "Description"

#: Takes subject, reply, headers and data of a message as it arrives.
Route = Callable[[str, str, Mapping[str, str], bytes], None]


def header_block(headers: Mapping[str, str]) -> bytes:
    """Encode headers; empty when there are none. Their text must have been checked before."""
    if not headers:
        return b""
    text = f"{HEADER_LINE}\r\n"
    for name, value in headers.items():
        text += f"{name}: {value}\r\n"
    return f"{text}\r\n".encode()


def frame(subject: str, payload: bytes, reply: str = "", headers: bytes = b"") -> bytes:
    """Encode one message as the server reads it; ``headers`` as ``header_block`` makes them."""
    if not headers:
        return b"%b%b\r\n" % (f"PUB {subject} {reply} {len(payload)}\r\n".encode(), payload)
    size = len(headers)
    line = f"HPUB {subject} {reply} {size} {size + len(payload)}\r\n"
    return b"%b%b%b\r\n" % (line.encode(), headers, payload)


def parse_headers(block: bytes) -> dict[str, str]:
    """Decode a header block; an inline status becomes ``Status`` and ``Description``.

    Never raises: lines that are no header are passed over, bytes that are no UTF-8 become
    U+FFFD, as nats-py does.
    """
    first, *lines = block.decode("utf-8", "replace").split("\r\n")
    headers: dict[str, str] = {}
    status = first[len(HEADER_LINE) :].strip(_BLANKS)
    if status:
        headers[STATUS], _, headers[DESCRIPTION] = status.partition(" ")
    for line in lines:
        name, separator, value = line.partition(":")
        if separator and name:
            headers[name.strip(_BLANKS)] = value.strip(_BLANKS)
    return headers


class AckSubject(NamedTuple):
    """What the reply subject of a JetStream delivery says."""

    stream: str
    attempt: int
    sequence: int
    timestamp: float


def parse_ack_subject(reply: str) -> AckSubject:
    """Read ``$JS.ACK...`` in both forms; ValueError for anything else.

    ``$JS.ACK.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>``, and since
    ADR-15 with ``<domain>.<account>`` before and a random token behind.
    """
    tokens = reply.split(".")
    if len(tokens) < 9 or tokens[0] != "$JS" or tokens[1] != "ACK":
        raise ValueError(f"{reply!r} is not the reply subject of a JetStream delivery")
    at = 2 if len(tokens) == 9 else 4
    delivered, sequence, _, time = tokens[at + 2 : at + 6]
    return AckSubject(tokens[at], int(delivered), int(sequence), int(time) / 1e9)


class FrameTap:
    """Takes the messages of known subscriptions out of what a server sends.

    It stands where the bytes arrive, before nats-py: a message there costs a pattern match, a
    queue and a task, and here a split and a call. All else goes on untouched and in order.

    :param routes: by subscription id; asked for every message.
    :param forward: takes the bytes of everything else.
    """

    def __init__(self, routes: Mapping[int, Route], forward: Callable[[bytes], None]) -> None:
        self._routes = routes
        self._forward = forward
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take what was received; a frame that is not complete is kept until it is."""
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        while at < end:
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                break
            frame_end = line_end + 2
            if data.startswith(_MESSAGES, at):
                words = data[at:line_end].split()
                frame_end += int(words[-1]) + 2
                if frame_end > end:
                    break
                route = self._routes.get(int(words[2]))
                if route is not None:
                    self._dispatch(route, words, data[line_end + 2 : frame_end - 2])
                    at = frame_end
                    continue
            self._forward(data[at:frame_end])
            at = frame_end
        self._rest = data[at:]

    def _dispatch(self, route: Route, words: list[bytes], body: bytes) -> None:
        """Call ``route`` for ``MSG subject sid [reply] size`` or ``HMSG ... header size``."""
        subject = words[1].decode()
        try:
            if words[0] == b"MSG":
                route(subject, words[3].decode() if len(words) == 5 else "", NO_HEADERS, body)
            else:
                split = int(words[-2])
                reply = words[3].decode() if len(words) == 6 else ""
                route(subject, reply, parse_headers(body[:split]), body[split:])
        except Exception:  # noqa: BLE001 - the other messages must still be read
            _log.exception(NOT_PASSED_ON, subject)
