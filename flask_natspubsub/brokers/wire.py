"""The bytes of the NATS client protocol that the hot paths write and read themselves.

Source: the NATS protocol reference (PUB, HPUB) and ADR-4 (headers); the ack subject is
described in ADR-15. Pure functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import NotASubject
from ..messages.headers import Headers, pairs_of
from ..messages.subjects import is_subject
from ..text import get_logger, printable

_log = get_logger("flask_natspubsub.broker")

NOT_PASSED_ON = "a message on %r could not be passed on"
HEADER_LINE = "NATS/1.0"
_NO_STATUS = b"NATS/1.0\r\n"
_BLANKS = " \t\n\r\v\f"
_MESSAGES = (b"MSG ", b"HMSG ")
NO_HEADERS: Mapping[str, str] = {}
STATUS = "Status"
DESCRIPTION = "Description"

#: Takes subject, reply, headers and data of a message as it arrives.
Route = Callable[[str, str, Mapping[str, str], bytes], None]


def header_block(headers: Mapping[str, str]) -> bytes:
    """Encode headers; empty when there are none. Their text should have been checked before.

    A header with a line break is escaped: it would be two headers. Never raises: it
    runs between the messages of others, who would wait for ever.
    """
    if not headers:
        return b""
    # A publish has a dict of its own making: one call less at each.
    pairs = headers.items() if type(headers) is dict else list(pairs_of(headers))
    text = f"{HEADER_LINE}\r\n"
    for name, value in pairs:
        text += f"{name}: {value}\r\n"
    lines = len(pairs) + 1
    if text.count("\n") != lines or text.count("\r") != lines:
        safe = [f"{printable(name)}: {printable(value)}" for name, value in pairs]
        text = "\r\n".join([HEADER_LINE, *safe, ""])
    return f"{text}\r\n".encode(errors="replace")


def check_subject(subject: str) -> str:
    """Return ``subject`` if a message can be sent to it.

    :raises NotASubject: it is empty, has a blank, something unprintable, an empty token or a
        wildcard: on the wire it would be another subject, or another line.
    """
    if not is_subject(subject):
        raise NotASubject(
            f"{subject!r:.200} is not a subject that a message can be sent to.",
            "A subject is printable tokens joined by dots, without blanks and wildcards.",
        )
    return subject


def frame(subject: str, payload: bytes, reply: str = "", headers: bytes = b"") -> bytes:
    """Encode one message as the server reads it; ``headers`` as ``header_block`` makes them.

    :raises NotASubject: ``subject`` or ``reply`` is none.
    """
    if not is_subject(subject) or not (reply.isprintable() and " " not in reply):
        check_subject(subject)
        check_subject(reply)
    size = len(headers)
    if size:
        line = f"HPUB {subject} {reply} {size} {size + len(payload)}\r\n"
    else:
        line = f"PUB {subject} {reply} {len(payload)}\r\n"
    return b"".join((line.encode(), headers, payload, b"\r\n"))


def ack_frame(reply: str) -> bytes:
    """Encode the acknowledgement of the delivery with this reply subject."""
    return f"PUB {reply}  4\r\n+ACK\r\n".encode()


def parse_headers(block: bytes) -> Headers:
    """Decode a header block; an inline status becomes ``Status`` and ``Description``.

    Never raises: lines that are no header are passed over, bytes that are no UTF-8 become
    U+FFFD, as nats-py does.
    """
    first, *lines = block.decode("utf-8", "replace").split("\r\n")
    headers = Headers()
    status = first[len(HEADER_LINE) :].strip(_BLANKS)
    if status:
        headers[STATUS], _, headers[DESCRIPTION] = status.partition(" ")
    for line in lines:
        name, separator, value = line.partition(":")
        if separator and name:
            headers.add(name.strip(_BLANKS), value.strip(_BLANKS))
    return headers


class LazyHeaders(Mapping[str, str]):
    """The headers of a message, read when one of them is asked for that may be there.

    Of most messages nobody asks for any, or only for some that are rare.

    :param block: as ``header_block`` makes it, with no status in its first line.
    """

    __slots__ = ("_block", "_read")

    def __init__(self, block: bytes) -> None:
        self._block = block
        self._read: Headers | None = None

    def _all(self) -> Headers:
        if self._read is None:
            self._read = parse_headers(self._block)
        return self._read

    def get(self, name: str, default: Any = None) -> Any:
        """Return one of the headers; without reading them if it cannot be among them."""
        return self._all().get(name, default) if name.encode() in self._block else default

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield each name with each of its values."""
        return self._all().pairs()

    def __getitem__(self, name: str) -> str:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return repr(self._all())


def parse_ack_subject(reply: str) -> tuple[str, int, int, float]:
    """Read ``$JS.ACK...`` in both forms; ValueError for anything else.

    :returns: the stream, which delivery this is, the sequence, and when it was stored.

    ``$JS.ACK.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>``, and since
    ADR-15 with ``<domain>.<account>`` before and a random token behind.
    """
    tokens = reply.split(".")
    if len(tokens) < 9 or not reply.startswith("$JS.ACK."):
        raise ValueError(f"{reply!r} is not the reply subject of a JetStream delivery")
    at = 2 if len(tokens) == 9 else 4
    return tokens[at], int(tokens[at + 2]), int(tokens[at + 3]), int(tokens[at + 5]) / 1e9


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
                    self._dispatch(route, words, data, line_end + 2, frame_end - 2)
                    at = frame_end
                    continue
            self._forward(data[at:frame_end])
            at = frame_end
        self._rest = data[at:]

    def _dispatch(
        self, route: Route, words: list[bytes], data: bytes, start: int, end: int
    ) -> None:
        """Call ``route`` for ``MSG subject sid [reply] size`` or ``HMSG ... header size``.

        What follows that line is in ``data`` from ``start`` to ``end``.
        """
        subject = words[1].decode()
        try:
            if words[0] == b"MSG":
                reply = words[3].decode() if len(words) == 5 else ""
                route(subject, reply, NO_HEADERS, data[start:end])
            else:
                reply = words[3].decode() if len(words) == 6 else ""
                split = start + int(words[-2])
                block = data[start:split]
                is_plain = block.startswith(_NO_STATUS)
                headers = LazyHeaders(block) if is_plain else parse_headers(block)
                route(subject, reply, headers, data[split:end])
        except (Exception, SystemExit, KeyboardInterrupt):  # noqa: BLE001 - others must be read
            _log.exception(NOT_PASSED_ON, subject)
