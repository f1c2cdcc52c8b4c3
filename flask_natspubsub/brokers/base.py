"""The port behind which NATS or memory stands.

A broker is called from ordinary threads: publishing threads hand messages over and wait on
a ``Ticket``; a worker is handed ``Delivery`` objects and settles them without waiting.
Whatever runs behind it (an event loop, a dict and a lock) is the broker's own affair.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from ..errors import PublishError
from ..messages.message import Message, StoredMessage
from ..signals import call_guarded

DeliverPolicy = Literal["all", "new", "last"]


class StoredAck(msgspec.Struct, frozen=True, gc=False, rename={"sequence": "seq"}):
    """The broker's word that a message is in a stream; in JSON, JetStream's PubAck."""

    stream: str
    sequence: int
    duplicate: bool = False


#: What became of a message: where it is stored, or why not.
Result = StoredAck | PublishError

# The broker gives each message its result within the timeout and a half second; a wait that is
# longer than this in addition means that the broker's thread itself is stuck.
_STUCK = 1.0


class Ticket:
    """The outcome, to come, of a batch of messages handed to a broker together.

    A bare lock is the waiter: it costs a tenth of an Event. Results are written by one thread
    at a time (the broker's) and read by others only after the lock was released.

    :param size: how many messages.
    """

    __slots__ = ("_callbacks", "_open", "_waiter", "results")

    def __init__(self, size: int) -> None:
        #: One entry a message, in order; None while nobody knows.
        self.results: list[Result | None] = [None] * size
        self._open = size
        self._waiter = threading.Lock()
        self._callbacks: list[Callable[[Ticket], None]] = []
        if size:
            self._waiter.acquire()

    @property
    def done(self) -> bool:
        """Whether every message has its result."""
        return self._open == 0

    def set_result(self, index: int, result: Result) -> None:
        """Set the result of message ``index``; a second result for it is ignored."""
        if self.results[index] is not None:
            return
        self.results[index] = result
        if self._open > 1:
            self._open -= 1
            return
        self._open = 0
        self._waiter.release()
        if self._callbacks:
            self._call_back()

    def wait(self, timeout: float) -> bool:
        """Block until all results are in; False if ``timeout`` seconds were not enough."""
        if not self._waiter.acquire(timeout=timeout):
            return False
        self._waiter.release()
        return True

    def results_within(self, timeout: float) -> list[Result]:
        """Wait for the results, for ``timeout`` seconds and a moment.

        A broker gives each message its result in that time. What has none, since the broker's
        thread is stuck, gets a ``PublishError`` with the outcome ``unknown``.
        """
        results: Any = self.results
        if self._waiter.acquire(timeout=timeout + _STUCK):
            self._waiter.release()
            return results  # type: ignore[no-any-return]  # all of them are set
        error = PublishError(
            f"The broker's thread did not answer within {timeout + _STUCK:g} s.",
            "A thread that keeps the interpreter busy may starve it.",
            outcome="unknown",
        )
        return [error if result is None else result for result in results]

    def on_done(self, callback: Callable[[Ticket], None]) -> None:
        """Call ``callback`` when all results are in, at once if they are; any thread."""
        self._callbacks.append(callback)
        if self._open == 0:
            self._call_back()

    def _call_back(self) -> None:
        """Call each callback once: a thread removes it before it calls it."""
        while True:
            try:
                callback = self._callbacks.pop()
            except IndexError:
                return
            call_guarded("a callback of a publish", callback, self)


class Delivery(ABC):
    """One delivery of one message to a consumer.

    ``ack``, ``nak``, ``term`` and ``in_progress`` may be called from any thread, never wait
    and never raise; the first of the first three settles the delivery, later ones do nothing.

    ``attempt`` says how often the server has delivered this message to this consumer, 1 is
    first; ``timestamp`` when the stream stored it, in seconds since the epoch.
    """

    __slots__ = (
        "attempt", "data", "headers", "sequence", "settled", "stream", "subject", "timestamp"
    )  # fmt: skip

    subject: str
    headers: Mapping[str, str]
    data: bytes
    stream: str
    sequence: int
    attempt: int
    timestamp: float
    settled: bool

    @abstractmethod
    def ack(self) -> None:
        """Done: never deliver it again."""

    @abstractmethod
    def nak(self, delay: float | None = None) -> None:
        """Deliver it again, after ``delay`` seconds or at once."""

    @abstractmethod
    def term(self, reason: str = "") -> None:
        """Given up: never deliver it again."""

    @abstractmethod
    def in_progress(self) -> None:
        """Still at work: start ``ack_wait`` anew."""


class ConsumerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a durable pull consumer should be; see the wire format, section Consumers.

    :param app: the app of its subscriber; with ``subscriber`` it says whose the consumer is, since
        two pairs may make one durable name: ``shop-eu`` and ``new``, ``shop`` and ``eu-new``.
    :param start_after: the sequence of the stream behind which a new consumer begins.
    :param elsewhere: where ``stream`` stores none of the subjects, the one that does is meant, and
        this is the consumer's name there; empty: only ``stream`` is meant.
    :param metadata: what is written on it, for people and other processes.
    """

    stream: str
    durable: str
    filter_subjects: tuple[str, ...]
    app: str = ""
    subscriber: str = ""
    start_after: int = 0
    ack_wait: float = 30.0
    deliver_policy: DeliverPolicy = "all"
    max_ack_pending: int = 1000
    elsewhere: str = ""
    metadata: Mapping[str, str] = {}


class StreamConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream should be when it has to be created; durations are seconds, 0 is none."""

    name: str
    subjects: tuple[str, ...]
    max_age: float = 0.0
    duplicate_window: float = 120.0
    max_msgs: int = -1
    max_bytes: int = -1
    storage: str = "file"
    replicas: int = 1
    discard: str = "old"
    retention: str = "limits"


class StreamInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A stream as the broker reports it.

    :param origins: the streams that it copies from.
    :param is_mirror: whether it is but a copy, and takes no messages itself.
    """

    config: StreamConfig
    messages: int = 0
    bytes: int = 0
    first_sequence: int = 0
    last_sequence: int = 0
    created: str = ""
    persist_mode: str = "default"
    max_msgs_per_subject: int = -1
    origins: tuple[str, ...] = ()
    is_mirror: bool = False


class ConsumerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A durable consumer as the broker reports it.

    :param delivered: the stream's sequence of the last message it was given; 0 is none.
    :param ack_floor: the stream's sequence up to which it has settled everything.
    :param created: when it was made, as the broker writes it (RFC 3339).
    :param last_active: when it last delivered something, as the broker writes it; empty if never.
    :param metadata: what was written on it when it was made or changed, without the server's own.
    :param is_pull: False where the server pushes to a subject: no worker of ours made that.
    """

    stream: str
    durable: str
    filter_subjects: tuple[str, ...]
    delivered: int = 0
    ack_floor: int = 0
    created: str = ""
    last_active: str = ""
    metadata: Mapping[str, str] = {}
    is_pull: bool = True
    pending: int = 0
    ack_pending: int = 0
    redelivered: int = 0
    waiting: int = 0


class Change(msgspec.Struct, frozen=True):
    """One thing ``setup`` did, would do, or found and left alone.

    ``action`` is ``create``, ``add_subjects``, ``differs`` or ``ok``.
    """

    action: Literal["create", "add_subjects", "differs", "ok"]
    stream: str
    detail: str = ""
    config: StreamConfig | None = None


class Consumption(ABC):
    """A worker's pull on one durable consumer.

    Nothing arrives until ``request``; what was requested and has not arrived stays
    requested across reconnects, server restarts and the loss of the consumer, which the
    broker mends by itself.
    """

    @abstractmethod
    def request(self, count: int) -> None:
        """Ask for ``count`` more messages; any thread, does not wait."""

    def bound(self, size: int, spare: Callable[[int], None]) -> None:  # noqa: B027 - may be empty
        """Let no more than ``size`` bytes be on their way at once; before the first ``request``.

        One message always comes, however large. ``spare`` is called in the broker's thread with
        how many of those requested will not come since they are too large for that; whether to
        request them again is for the caller to say. Where nothing is on its way, as in memory,
        there is nothing to bound.
        """

    @abstractmethod
    def stop(self, timeout: float = 5.0) -> None:
        """Stop pulling. Afterwards nothing is delivered; what was on its way is handed back."""

    @property
    def consumer(self) -> tuple[str, str] | None:
        """Stream and durable that it pulls from; None if it is those that it was asked for."""
        return None

    @property
    def ack_wait(self) -> float:
        """Seconds after which the server delivers again; infinite if it is what was asked for."""
        return math.inf

    def ping(self, callback: Callable[[], None]) -> None:
        """Schedule ``callback`` on the pulling thread; it never runs if that thread hangs."""
        callback()

    @property
    @abstractmethod
    def is_healthy(self) -> bool:
        """Whether the pull has been heard of lately (message or heartbeat)."""


class CoreSubscription(ABC):
    """Interest in a subject outside any stream."""

    @abstractmethod
    def stop(self) -> None:
        """Lose interest."""


class Broker(ABC):
    """Carries messages. All methods are safe to call from any thread that runs no event loop.

    Methods with a ``timeout`` (seconds) raise ``NotConnected`` when there is no server in that
    time and ``BrokerError`` when the server does not answer or refuses.
    """

    #: Whether the server has refused to let this user read stored messages.
    reads_denied = False

    @property
    @abstractmethod
    def is_connected(self) -> bool:
        """Whether there is a live connection now."""

    @property
    @abstractmethod
    def max_payload(self) -> int:
        """Bytes of payload and headers the server takes, or took when last seen."""

    @property
    def server_version(self) -> str:
        """The version of the server, as ``2.12.1``; empty if there is none, or it is not known."""
        return ""

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller runs in the broker's own thread, which must not wait for it."""
        return False

    def load(self) -> dict[str, int]:
        """Return how much is on its way, with the limits, for health; empty if nothing can be."""
        return {}

    @abstractmethod
    def connect(self, timeout: float) -> None:
        """Wait until there is a connection."""

    @abstractmethod
    def close(self, timeout: float = 5.0) -> None:
        """Send what is buffered, then close; afterwards the broker cannot be used."""

    # --- publishing

    @abstractmethod
    def submit(self, messages: Sequence[Message], timeout: float) -> Ticket:
        """Hand messages over to be stored, in order; does not wait for the answer.

        Each message gets a result within ``timeout`` seconds (plus half a second). Blocks,
        up to ``timeout``, only while the broker holds as much as it may.
        """

    @abstractmethod
    def send(self, subject: str, payload: bytes) -> None:
        """Send outside any stream; it may be lost; never waits or raises."""

    # --- consuming

    @abstractmethod
    def consume(self, config: ConsumerConfig, deliver: Callable[[Delivery], None]) -> Consumption:
        """Create or update the durable consumer and start a pull on it.

        ``deliver`` is called in the broker's thread and must return quickly. A server that
        is down is no error: the pull starts when it is back.

        :raises TopologyError: the stream is missing, or does not cover a filter subject.
        """

    def before_replies(self, callback: Callable[[], None]) -> None:  # noqa: B027 - none are sent
        """Have ``callback`` called in the broker's thread before acknowledgements are sent.

        It must be quick and not raise. A broker within the process sends none.
        """

    @abstractmethod
    def add_consumer(self, config: ConsumerConfig) -> None:
        """Create or update a durable consumer without a pull.

        :raises TopologyError: the stream is missing, or does not cover a filter subject.
        """

    @abstractmethod
    def listen(self, subject: str, callback: Callable[[Message], None]) -> CoreSubscription:
        """Call ``callback`` (broker's thread) for every message sent to ``subject``."""

    # --- looking after streams

    @abstractmethod
    def want(self, streams: Sequence[StreamConfig]) -> None:
        """Look after these streams, now and whenever there is a new connection.

        Replaces what was wanted before. Does not wait for a server that is down; what cannot
        be set up is logged, and shows as an error where it is needed.
        """

    @abstractmethod
    def setup(self, streams: Sequence[StreamConfig], *, dry_run: bool = False) -> list[Change]:
        """Create what is missing; see ``topology.plan`` for the rules.

        :raises TopologyError: another stream has one of the subjects.
        """

    @abstractmethod
    def stream_info(self, stream: str) -> StreamInfo | None:
        """Report on a stream; None if there is none."""

    @abstractmethod
    def consumer_info(self, stream: str, durable: str) -> ConsumerInfo | None:
        """Report on a consumer; None if there is none."""

    @abstractmethod
    def place(self, config: ConsumerConfig) -> ConsumerConfig:
        """Return the config with the stream and the name that count; see its ``elsewhere``.

        :raises TopologyError: several streams store some of its subjects.
        """

    @abstractmethod
    def consumers(self, stream: str) -> list[ConsumerInfo]:
        """Report on all durable consumers of a stream, by name; none if there is no stream."""

    @abstractmethod
    def delete_consumer(self, stream: str, durable: str) -> bool:
        """Delete a consumer; False if there was none."""

    @abstractmethod
    def get_message(self, stream: str, sequence: int) -> StoredMessage | None:
        """Read one message; None if it is gone."""

    def get_messages(
        self, places: Sequence[tuple[str, int]], timeout: float
    ) -> list[StoredMessage | None]:
        """Read several messages, each by stream and sequence; None for each that is gone."""
        return [self.get_message(stream, sequence) for stream, sequence in places]

    @abstractmethod
    def messages(
        self, stream: str, subject: str = ">", *, after: int = 0
    ) -> Iterator[StoredMessage]:
        """Read messages whose subject matches, oldest first, with a sequence above ``after``."""

    @abstractmethod
    def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        """Read the newest message of exactly this subject."""

    @abstractmethod
    def delete_message(self, stream: str, sequence: int) -> bool:
        """Delete one message; False if it was gone."""

    # --- time

    @abstractmethod
    def now(self) -> float:
        """Seconds since the epoch on the broker's clock, which tests may turn."""
