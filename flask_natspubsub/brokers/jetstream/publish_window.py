"""Messages on their way to the stream: handed over by threads, sent and settled on the loop.

Many publishes share one wake-up of the loop, one write and one reply inbox; each carries a
token in its reply subject. What is in flight is bounded in count and bytes, so a slow server
makes publishers wait instead of growing the process. Deadlines are kept by one sweep.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from ...config.settings import Settings
from ...errors import (
    NoStreamForSubject,
    NotASubject,
    NotConnected,
    PayloadTooLarge,
    PublishDenied,
    PublishError,
)
from ...messages.message import Message
from ...text import get_logger
from ..base import StoredAck, Ticket
from ..wire import STATUS, frame, header_block

if TYPE_CHECKING:
    from .link import Link

#: The error of a stream whose own limit for one message is lower than the server's.
STREAM_MESSAGE_TOO_LARGE = 10054

_log = get_logger("flask_natspubsub.broker")

IN_FLIGHT_BYTES = 32 * 1024 * 1024
#: Messages that are written at once.
WRITE = 128
SWEEP = 0.05
# "No responders" is also what a server says while a stream elects its leader (ADR-22), so
# it is tried again after these seconds before it is an error. Where there is or may be such a
# stream, it is tried again after the last of them until the time is up.
NO_RESPONDERS_WAITS = (0.05, 0.1, 0.2, 0.4)
#: Subjects that are remembered since a stream has stored them before.
SUBJECTS = 1000
NO_RESPONDERS = "503"
# A stream may refuse to store while its servers look healthy: UNANSWERED publishes without an
# acknowledgement, the last of them within UNANSWERED_SECONDS, make the broker unhealthy.
UNANSWERED = 3
UNANSWERED_SECONDS = 60.0


class _Item(msgspec.Struct, gc=False):
    """One message and where its result belongs: entry ``index`` of ``ticket``.

    :param size: in bytes, headers included: about as many while it is queued, exact in flight.
    """

    message: Message
    size: int
    ticket: Ticket
    index: int
    deadline: float
    due: float = 0.0
    sent: bool = False
    tries: int = 0

    def set_result(self, result: StoredAck | PublishError) -> None:
        self.ticket.set_result(self.index, result)


class PublishWindow:
    """The queue, and the window of what was sent and is not yet acknowledged.

    Threads put items into ``_arrived`` and count them, under the lock; all else is the loop's
    alone. What is queued, there or in ``_queue``, is bounded, and so is what is in flight.
    """

    def __init__(self, link: Link, inbox: str, settings: Settings) -> None:
        self._link = link
        self._most_in_flight = settings.publish_in_flight
        self._most_queued = settings.publish_queue
        self._most_queued_bytes = settings.publish_queue_bytes
        self._prefix = inbox + "."
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._waiting = 0
        self._arrived: list[_Item] = []
        self._queued = 0
        self._queued_bytes = 0
        self._scheduled = False
        self._is_closed = False
        self._queue: deque[_Item] = deque()
        self._delayed: list[_Item] = []
        #: By reply subject.
        self._in_flight: dict[str, _Item] = {}
        self._bytes = 0
        self._token = 0
        self._sweeping = False
        self._unanswered = 0
        self._unanswered_at = 0.0
        #: What a stream has stored before: there is one, though it may have no leader now.
        self._stored: set[str] = set()

    # --- any thread

    def submit(self, messages: Sequence[Message], timeout: float) -> Ticket:
        """Queue messages; their results arrive in the ticket within ``timeout``."""
        ticket = Ticket(len(messages))
        deadline = time.monotonic() + timeout
        items, total = [], 0
        for index, message in enumerate(messages):
            size = len(message.data) + sum(map(len, message.headers.values()))
            total += size
            items.append(_Item(message, size, ticket, index, deadline))
        refusal, wake = None, False
        with self._lock:
            if self._is_full or self._is_closed:
                refusal = self._wait_for_room(deadline)
            if refusal is None:
                self._arrived += items
                self._queued += len(items)
                self._queued_bytes += total
                wake, self._scheduled = not self._scheduled, True
        if wake:
            self._link.wake(self._drain)
        elif refusal is not None:
            for item in items:
                item.set_result(refusal)
        return ticket

    def _wait_for_room(self, deadline: float) -> PublishError | None:
        """Wait, with the lock, until there is room; the error if there is none in time."""
        self._waiting += 1
        try:
            self._room.wait_for(
                lambda: self._is_closed or not self._is_full, deadline - time.monotonic()
            )
        finally:
            self._waiting -= 1
        if self._is_closed:
            return _closed()
        if self._is_full:
            return PublishError(
                f"{self._queued:,} messages are waiting to be sent already.",
                "The server is slower than this process; publish less at once.",
            )
        return None

    @property
    def _is_full(self) -> bool:
        return self._queued >= self._most_queued or self._queued_bytes >= self._most_queued_bytes

    def load(self) -> dict[str, int]:
        """Return what is queued and in flight, each with its limit."""
        return {
            "publishes_queued": self._queued,
            "publishes_queued_limit": self._most_queued,
            "publishes_queued_bytes": self._queued_bytes,
            "publishes_queued_bytes_limit": self._most_queued_bytes,
            "publishes_in_flight": len(self._in_flight),
            "publishes_in_flight_limit": self._most_in_flight,
            "publishes_unanswered": self._unanswered if self.is_mute else 0,
        }

    @property
    def is_mute(self) -> bool:
        """Whether the server takes publishes and has acknowledged none of late."""
        recent = time.monotonic() - self._unanswered_at < UNANSWERED_SECONDS
        return recent and self._unanswered >= UNANSWERED

    @property
    def unsettled(self) -> int:
        """How many messages are queued or in flight."""
        return self._queued + len(self._in_flight) + len(self._delayed)

    # --- the loop's thread

    def _drain(self) -> None:
        """Send what has arrived, as far as the window allows."""
        self._take_in()
        if self._link.refused:
            self.fail_all(NotConnected(self._link.refused))
        elif self._link.is_up:
            self._fill_window()
        if not self._sweeping and self.unsettled:
            self._sweeping = True
            self._link.later(SWEEP, self._sweep)

    def _take_in(self) -> None:
        with self._lock:
            self._scheduled = False
            arrived, self._arrived = self._arrived, []
        self._queue += arrived

    def _fill_window(self) -> None:
        frames: list[bytes] = []
        count = size = 0
        if self._link.unsent > IN_FLIGHT_BYTES:
            return  # those whose time has run out are in the socket's buffer still
        limit = self._link.max_payload
        most = self._most_in_flight - len(self._delayed)
        while self._queue and len(self._in_flight) < most and self._bytes < IN_FLIGHT_BYTES:
            item = self._queue.popleft()
            count += 1
            size += item.size
            message = item.message
            # Here and not in the publishing thread: meanwhile the server works on those before it.
            headers = header_block(message.headers)
            item.size = len(headers) + len(message.data)
            if item.size > limit:
                item.set_result(PayloadTooLarge.of(message.subject, item.size, limit))
                continue
            self._token += 1
            reply = f"{self._prefix}{self._token}"
            try:
                encoded = frame(message.subject, message.data, reply, headers)
            except NotASubject as error:
                item.set_result(error)
                continue
            frames.append(encoded)
            self._in_flight[reply] = item
            self._bytes += item.size
            item.sent = True
            if len(frames) == WRITE:
                # A loop may write at the end of its turn only: the server can begin while the
                # others are encoded.
                self._drain_again()
                break
        if frames:
            self._link.send(frames)
        self._unqueue(count, size)

    def _drain_again(self) -> None:
        """Drain in the next turn of the loop."""
        if not self._scheduled:
            self._scheduled = True
            self._link.later(0, self._drain)

    def _unqueue(self, count: int, size: int) -> None:
        """Subtract what has left the queue, and wake up those who wait; negative: was put back."""
        with self._lock:
            self._queued -= count
            self._queued_bytes -= size
            if self._waiting:
                self._room.notify_all()

    def _put_back(self, items: Iterable[_Item]) -> None:
        """Queue in front of all others, in the order given."""
        back = list(items)
        self._queue.extendleft(reversed(back))
        self._unqueue(-len(back), -sum(item.size for item in back))

    def _take_from_queue(self, items: list[_Item]) -> list[_Item]:
        gone = {id(item) for item in items}
        self._queue = deque(item for item in self._queue if id(item) not in gone)
        self._unqueue(len(items), sum(item.size for item in items))
        return items

    def on_reply(self, subject: str, reply: str, headers: Mapping[str, str], data: bytes) -> None:
        """Settle the message that asked for its answer at ``subject``."""
        item = self._in_flight.pop(subject, None)
        if item is None:
            return
        self._bytes -= item.size
        if headers and headers.get(STATUS) == NO_RESPONDERS:
            self._no_responders(item)
        else:
            self._unanswered = 0
            subject = item.message.subject
            item.ticket.set_result(item.index, _result_of(data, subject, item.size))
            if subject not in self._stored and len(self._stored) < SUBJECTS:
                self._stored.add(subject)
        if self._queue:
            self._drain_again()

    def _no_responders(self, item: _Item) -> None:
        now = time.monotonic()
        is_likely = self._link.cluster_size > 1 or item.message.subject in self._stored
        if now < item.deadline and (is_likely or item.tries < len(NO_RESPONDERS_WAITS)):
            item.due = now + NO_RESPONDERS_WAITS[min(item.tries, len(NO_RESPONDERS_WAITS) - 1)]
            item.tries += 1
            item.sent = False
            self._delayed.append(item)
            self._link.mend_streams()
            return
        item.set_result(_no_stream(item))

    def on_up(self) -> None:
        """Send what has been waiting for a connection."""
        self._drain()

    def on_down(self) -> None:
        """Put what was in flight back in front: same id, so a second copy is not stored."""
        self._put_back(self._in_flight.values())
        self._in_flight.clear()
        self._bytes = 0
        self._unanswered = 0

    def on_denied(self, subject: str) -> None:
        """Fail what was sent to ``subject``: the server reports this out of band.

        nats-py turns the report into lower case.
        """
        for reply, item in list(self._in_flight.items()):
            if item.message.subject.lower() == subject.lower():
                self._forget(reply)
                item.set_result(
                    PublishDenied(
                        f"The server does not let this user publish to {item.message.subject!r}.",
                        "Grant the permission, or check NATSPUBSUB_ENV and NATSPUBSUB_APP_NAME.",
                    )
                )

    def fail_all(self, error: PublishError) -> None:
        """Settle everything with ``error``; what was sent keeps an unknown outcome."""
        self._take_in()
        queued = self._take_from_queue(list(self._queue))
        items = [*self._in_flight.values(), *self._delayed, *queued]
        self._in_flight.clear()
        self._delayed.clear()
        self._bytes = 0
        for item in items:
            item.set_result(_with_outcome(error, item))

    def close(self) -> None:
        """Settle everything, and whatever comes later, as closed."""
        with self._lock:
            self._is_closed = True
            self._room.notify_all()
        self.fail_all(_closed())

    def _forget(self, reply: str) -> None:
        self._bytes -= self._in_flight.pop(reply).size

    def _sweep(self) -> None:
        self._sweeping = False
        now = time.monotonic()
        for reply, item in list(self._in_flight.items()):
            if item.deadline <= now:
                self._forget(reply)
                item.set_result(self._timed_out(item))
        self._release_delayed(now)
        overdue = [item for item in self._queue if item.deadline <= now]
        for item in self._take_from_queue(overdue) if overdue else ():
            item.set_result(self._timed_out(item))
        self._drain()

    def _release_delayed(self, now: float) -> None:
        due = [item for item in self._delayed if item.due <= now]
        if due:
            self._delayed = [item for item in self._delayed if item.due > now]
            self._put_back(due)

    def _timed_out(self, item: _Item) -> PublishError:
        if not self._link.is_up:
            return _with_outcome(NotConnected(self._link.describe_down()), item)
        if not item.sent and item.tries:
            return _no_stream(item)
        if not item.sent:
            return PublishError(
                "The message waited too long behind others and was not sent.",
                "The server is slower than this process; publish less at once.",
            )
        self._note_unanswered()
        return PublishError(
            f"No acknowledgement for {item.message.subject!r} came in time; "
            "it may or may not be stored.",
            "Publish again with the same event_id: a second copy is not stored.",
            outcome="unknown",
        )

    def _note_unanswered(self) -> None:
        self._unanswered += 1
        self._unanswered_at = time.monotonic()
        if self._unanswered == UNANSWERED:
            _log.error(
                "connected to NATS, but the last %d publishes were not acknowledged: "
                "look at the stream's leader and replicas",
                UNANSWERED,
            )


def _closed() -> PublishError:
    return PublishError("The broker was closed before an answer came.", "Publish again.")


def _no_stream(item: _Item) -> NoStreamForSubject:
    return NoStreamForSubject(
        f"No stream stores the subject {item.message.subject!r}.",
        "Run `flask natspubsub setup`, or turn NATSPUBSUB_AUTO_SETUP on.",
    )


def _with_outcome(error: PublishError, item: _Item) -> PublishError:
    return type(error)(error.message, error.fix, outcome="unknown" if item.sent else "not_sent")


# --- what a stream answers: an acknowledgement, or why not


class _Refusal(msgspec.Struct):
    error: dict[str, object]


_decode_ack = msgspec.json.Decoder(StoredAck).decode


def _result_of(data: bytes, subject: str, size: int) -> StoredAck | PublishError:
    """Read the answer to the publish of ``size`` bytes to ``subject``."""
    try:
        ack = _decode_ack(data)
        if ack.sequence:
            return ack
    except msgspec.MsgspecError:
        pass
    return _why_not(data, subject, size)


def _why_not(data: bytes, subject: str, size: int) -> PublishError:
    try:
        error = msgspec.json.decode(data, type=_Refusal).error
    except msgspec.MsgspecError:
        return PublishError(
            f"Something other than JetStream answered on {subject!r}.",
            "Another service replies to this subject; it should not.",
            outcome="unknown",
        )
    text = f"The stream refused the message: {error.get('description', error)}."
    if error.get("err_code") == STREAM_MESSAGE_TOO_LARGE:
        return PayloadTooLarge(text, "Raise max_msg_size of the stream.", size=size)
    if error.get("code") == 503:
        return PublishError(text, "The stream may be full, or without a leader; try again later.")
    return PublishDenied(text, "Compare the stream's settings with what is published.")
