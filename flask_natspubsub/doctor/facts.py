"""The facts that ``doctor`` goes by, as plain values."""

from __future__ import annotations

import msgspec

DAY = 24 * 3600.0


class StreamFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A stream as the server reports it; durations are seconds, 0 is without end."""

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
    """A subscriber and what the server has of it.

    :param exists: whether a worker has made its consumer.
    :param missing_subjects: what the subscriber wants and the consumer does not get.
    :param extra_subjects: what the consumer gets and the subscriber does not want.
    """

    name: str
    exists: bool = False
    missing_subjects: tuple[str, ...] = ()
    extra_subjects: tuple[str, ...] = ()
    ack_wait: float = 30.0
    timeout: float = 60.0
    inbox: bool = True


class OrphanFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A consumer of this application that no subscriber has and no worker pulls from.

    :param subscriber: the name that it was made for.
    :param is_certain: whether it says so itself; else another app with a longer name may own it.
    :param is_main: whether it is on the application's stream.
    :param waiting: how many messages it has not settled, which an interest or work queue stream
        keeps for it.
    :param retains: whether the stream keeps them for it.
    """

    stream: str
    durable: str
    subscriber: str
    is_certain: bool = True
    is_main: bool = True
    created: str = ""
    last_active: str = ""
    waiting: int = 0
    retains: bool = False


class OutboxFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The outbox's rows and retention.

    :param savepoints: whether a rollback undoes what was done in savepoints before it.
    :param rewound: stream and reason of each loss that was noticed and is not repaired.
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
    """The server, and what its monitoring says; None is what nobody has told.

    :param sync_interval: seconds between two writes to the disk.
    :param sync_always: whether it writes before it acknowledges.
    :param cluster_size: servers in its cluster; 1 if it is alone.
    """

    version: str = ""
    sync_interval: float | None = None
    sync_always: bool | None = None
    cluster_size: int | None = None
    monitor_problem: str = ""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All that the checks go by.

    :param orphans: consumers of subscribers that the code has no more.
    :param outbox: None if the application has none.
    :param setup: what ``setup`` would do: what, of which stream, in words.
    :param setup_problem: why it could not be told, such as subjects of another's stream.
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
