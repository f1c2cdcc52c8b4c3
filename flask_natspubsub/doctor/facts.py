"""The facts that ``doctor`` judges, as plain values; ``--json`` prints them as they are."""

from __future__ import annotations

import msgspec

from ..config.parsers import DAY
from ..inspection import OrphanFacts


class StreamFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A stream as the server reports it; durations are seconds, 0 is unlimited."""

    name: str
    exists: bool = True
    storage: str = "file"
    replicas: int = 1
    persist_mode: str = "default"
    discard: str = "old"
    retention: str = "limits"
    duplicate_window: float = 120.0
    max_age: float = 0.0
    is_main: bool = True


class ConsumerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A subscriber's options, and how its consumer differs from them; durations are seconds.

    :param exists: whether a worker has made its consumer.
    :param missing_subjects: subjects that the subscriber wants and the consumer does not receive.
    :param extra_subjects: subjects that the consumer receives and the subscriber does not want.
    """

    name: str
    exists: bool = False
    missing_subjects: tuple[str, ...] = ()
    extra_subjects: tuple[str, ...] = ()
    ack_wait: float = 30.0
    timeout: float = 60.0
    inbox: bool = True


class OutboxFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The outbox's rows and retention; durations are seconds.

    :param oldest_pending: how long the oldest due row has been waiting; None if none is due.
    :param savepoints: whether a rollback undoes what was done in savepoints before it.
    :param rewound: name and reason of each stream whose loss was noticed and is not repaired.
    """

    retention: float = DAY
    inbox_retention: float = 7 * DAY
    pending: int = 0
    parked: int = 0
    oldest_pending: float | None = None
    has_relay: bool = True
    savepoints: bool = True
    rewound: tuple[tuple[str, str], ...] = ()


class ServerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The server by its connection and its monitoring; None is unknown.

    :param sync_interval: seconds between two writes to the disk.
    :param sync_always: whether it writes before it acknowledges.
    :param cluster_size: servers in its cluster; 1 if it is alone.
    :param monitor_problem: why the monitoring address did not help; empty if it did.
    """

    version: str = ""
    sync_interval: float | None = None
    sync_always: bool | None = None
    cluster_size: int | None = None
    monitor_problem: str = ""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the checks need.

    :param orphans: consumers whose subscribers the code does not have any more.
    :param outbox: None if the application has none.
    :param setup: action, stream and detail of each change that ``setup`` would make.
    :param setup_problem: why ``setup`` would fail, such as subjects of another stream; empty if it
        would not.
    :param unbound: subjects that the application uses and no stream stores.
    """

    server: ServerFacts
    streams: tuple[StreamFacts, ...] = ()
    consumers: tuple[ConsumerFacts, ...] = ()
    orphans: tuple[OrphanFacts, ...] = ()
    outbox: OutboxFacts | None = None
    setup: tuple[tuple[str, str, str], ...] = ()
    setup_problem: str = ""
    unbound: tuple[str, ...] = ()
    allow_volatile: bool = False
