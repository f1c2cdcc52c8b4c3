"""Settling of deliveries: acks, naks and terms are collected and sent together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..base import Delivery
from ..wire import ack_frame, frame, parse_ack_subject

if TYPE_CHECKING:
    from .link import Link

#: Seconds for which acks are collected while they keep coming.
LINGER = 0.001
#: Seconds instead, after a write of at least ``BUSY`` replies: then the next has more to share.
LINGER_BUSY, BUSY = 0.002, 16
NANO = 1_000_000_000


class ReplyWriter:
    """Collects the replies to deliveries from all threads and sends them together.

    The first one after a pause is sent at once; what follows within ``LINGER`` goes together,
    since each wake-up of the loop and each write costs more than handling a message may.

    :param before: called before they are sent; must not raise.
    """

    def __init__(self, link: Link, before: Callable[[], None] = lambda: None) -> None:
        self._link = link
        self._before = before
        self._replies: deque[bytes] = deque()
        self._scheduled = False

    def put(self, reply: bytes) -> None:
        """Queue the frame of one reply; never waits."""
        self._replies.append(reply)
        if not self._scheduled:
            self._scheduled = True
            self._link.wake(self._send_on)

    def _send_on(self) -> None:
        self._link.later(LINGER if self.flush() < BUSY else LINGER_BUSY, self._look_again)

    def _look_again(self) -> None:
        self._scheduled = False  # before the look: a reply put after it schedules itself
        if self._replies and self._link.is_up:
            self._scheduled = True
            self._send_on()

    def flush(self) -> int:
        """Send what is queued and return its number; keep it while there is no connection."""
        if not self._link.is_up:
            return 0
        out = []
        while self._replies:
            out.append(self._replies.popleft())
        if out:
            self._before()
            self._link.send(out)
        return len(out)


class NatsDelivery(Delivery):
    """A delivery from JetStream, whose reply subject holds its stream, sequence and attempt."""

    __slots__ = ("_reply", "_writer")

    def __init__(
        self,
        subject: str,
        reply: str,
        headers: Mapping[str, str],
        data: bytes,
        writer: ReplyWriter,
    ) -> None:
        self.subject = subject
        self.headers = headers
        self.data = data
        self.settled = False
        self.stream, self.attempt, self.sequence, self.timestamp = parse_ack_subject(reply)
        self._reply = reply
        self._writer = writer

    def _settle(self, payload: bytes) -> None:
        if not self.settled:
            self.settled = True
            self._writer.put(frame(self._reply, payload))

    def ack(self) -> None:  # noqa: D102 - documented in the port, as the rest below
        if not self.settled:
            self.settled = True
            self._writer.put(ack_frame(self._reply))

    def nak(self, delay: float | None = None) -> None:  # noqa: D102
        self._settle(b'-NAK {"delay": %d}' % int(delay * NANO) if delay else b"-NAK")

    def term(self, reason: str = "") -> None:  # noqa: D102
        self._settle(f"+TERM {reason}".rstrip().encode())

    def in_progress(self) -> None:  # noqa: D102
        if not self.settled:
            self._writer.put(frame(self._reply, b"+WPI"))
