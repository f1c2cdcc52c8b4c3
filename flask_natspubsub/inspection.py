"""The read model of one application: subscribers and their lag, outbox and inbox.

The command line, the doctor and the health checks show these facts and ask nobody themselves.
Every function asks for one kind of fact and changes nothing. Facts are plain values, so whoever
shows them needs neither the broker nor the database.

Functions that take a broker raise ``BrokerError`` if it does not answer; those that take a
store or inbox raise ``DatabaseError`` if the database fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from .brokers.base import Broker, ConsumerConfig, ConsumerInfo, StreamInfo
from .brokers.topology import OWNER_APP, uncovered
from .config.settings import Settings
from .outbox.names import PARTITION
from .subscribing.durables import name_of, orphans, place_of
from .subscribing.subscription import Subscription

if TYPE_CHECKING:  # they need SQLAlchemy, which is optional
    from .inbox.inbox import Inbox
    from .outbox.store import OutboxStore

#: Age in seconds of the oldest due row from which the outbox counts as stuck.
STUCK = 60.0


# --- subscribers


class SubscriberFacts(msgspec.Struct, frozen=True):
    """A subscriber, and its consumer at the server.

    :param place: the stream it receives from, and the consumer it needs there.
    :param consumer: the consumer as the server reports it, with the lag: ``pending``,
        ``ack_pending``, ``redelivered``. None if there is none, or the server was not asked.
    """

    subscription: Subscription
    place: ConsumerConfig
    consumer: ConsumerInfo | None = None

    @property
    def missing_subjects(self) -> tuple[str, ...]:
        """Subjects that the subscriber wants and its consumer does not receive."""
        if self.consumer is None:
            return ()
        return uncovered(self.place.filter_subjects, self.consumer.filter_subjects)

    @property
    def extra_subjects(self) -> tuple[str, ...]:
        """Subjects that the consumer receives and the subscriber does not want."""
        if self.consumer is None:
            return ()
        return uncovered(self.consumer.filter_subjects, self.place.filter_subjects)


def subscribers(
    settings: Settings, subscriptions: Sequence[Subscription], broker: Broker | None = None
) -> tuple[SubscriberFacts, ...]:
    """Describe each subscriber; without a broker, by what the code says alone."""
    if broker is None:
        return tuple(
            SubscriberFacts(one, one.consumer_config(settings.stream)) for one in subscriptions
        )
    places = [place_of(broker, settings, one) for one in subscriptions]
    consumers = [broker.consumer_info(place.stream, place.durable) for place in places]
    return tuple(map(SubscriberFacts, subscriptions, places, consumers))


class OrphanFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A consumer of this application that no subscriber has and no worker pulls from.

    :param subscriber: the name of the subscriber it was made for.
    :param is_certain: whether its metadata names this app; without metadata, another app with a
        longer name may own it.
    :param is_main: whether it is on the application's stream.
    :param created: RFC 3339, as the server writes it; likewise ``last_active``.
    :param waiting: the number of messages that it has not settled.
    :param retains: whether an interest or work queue stream keeps these messages for it.
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


def orphaned_consumers(
    settings: Settings, subscriptions: Sequence[Subscription], broker: Broker
) -> tuple[OrphanFacts, ...]:
    """Return the consumers of subscribers that the code does not have any more.

    One that a worker pulls from is left out: an older or newer version of the code knows it.

    :param subscriptions: all that the app has.
    :raises RequestDenied: the user may not list consumers.
    """
    found = [info for info in orphans(broker, settings, subscriptions) if not info.waiting]
    streams = {info.stream: broker.stream_info(info.stream) for info in found}
    return tuple(_orphan(info, streams[info.stream], settings) for info in found)


def _orphan(info: ConsumerInfo, stream: StreamInfo | None, settings: Settings) -> OrphanFacts:
    retention = stream.config.retention if stream else ""
    return OrphanFacts(
        stream=info.stream,
        durable=info.durable,
        subscriber=name_of(info, settings.app_name),
        is_certain=OWNER_APP in info.metadata,
        is_main=info.stream == settings.stream,
        created=info.created,
        last_active=info.last_active,
        waiting=info.pending + info.ack_pending,
        retains=retention not in ("", "limits"),
    )


# --- the outbox


class OutboxRows(msgspec.Struct, frozen=True, kw_only=True):
    """The number of rows of each status.

    :param oldest_pending_seconds: how long the oldest due row has been waiting; None if there is
        none.
    """

    pending: int
    sent: int
    parked: int
    oldest_pending_seconds: float | None


def outbox_rows(store: OutboxStore) -> OutboxRows:
    """Count all rows, which takes the longer the more there are; see ``outbox_health``."""
    return OutboxRows(**store.counts())


class RewoundStream(msgspec.Struct, frozen=True):
    """A stream that lost acknowledged messages which were not sent again yet.

    :param reason: how that was noticed.
    """

    name: str
    reason: str


def rewound_streams(store: OutboxStore) -> tuple[RewoundStream, ...]:
    """Return the streams whose loss is not repaired."""
    return tuple(RewoundStream(one.name, one.reason) for one in store.streams.rewound())


class OutboxHealth(msgspec.Struct, frozen=True):
    """Whether rows leave the outbox, and stay sent.

    :param oldest_pending_seconds: how long the oldest due row has been waiting; None if there is
        none.
    """

    oldest_pending_seconds: float | None
    rewound: tuple[RewoundStream, ...]

    @property
    def is_ok(self) -> bool:
        """Whether nothing is stuck and no stream is rewound."""
        return not self.rewound and not is_stuck(self.oldest_pending_seconds)


def outbox_health(store: OutboxStore) -> OutboxHealth:
    """Look at the oldest row and the streams; costs the same however many rows there are."""
    return OutboxHealth(store.oldest_pending_age(), rewound_streams(store))


def is_stuck(oldest_pending_seconds: float | None) -> bool:
    """Whether the oldest due row has waited for so long that something must be wrong."""
    return oldest_pending_seconds is not None and oldest_pending_seconds >= STUCK


class PartitionLease(msgspec.Struct, frozen=True):
    """Who relays a partition of the outbox.

    :param owner: the relay; None if no relay holds the lease.
    """

    partition: int
    owner: str | None = None
    seconds_left: float = 0.0


def partition_leases(store: OutboxStore) -> dict[int, PartitionLease]:
    """Return the leases that relays hold now, by partition; expired ones are left out."""
    held = [one for one in store.leases.holders() if one["seconds_left"] > 0]
    numbers = {
        int(one["name"].removeprefix(PARTITION)): one
        for one in held
        if one["name"].startswith(PARTITION)
    }
    return {
        number: PartitionLease(number, one["owner"], float(one["seconds_left"]))
        for number, one in numbers.items()
    }


# --- the inbox


class InboxRows(msgspec.Struct, frozen=True):
    """The number of events that one subscriber has handled and remembers."""

    subscriber: str
    events: int


def inbox_rows(inbox: Inbox) -> tuple[InboxRows, ...]:
    """Count all rows by subscriber, in order of name."""
    return tuple(InboxRows(name, events) for name, events in inbox.counts().items())
