"""Gathers what ``doctor`` judges: facts of the read model, and the server's monitoring."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .. import inspection
from ..brokers.base import Broker, ConsumerConfig, StreamConfig, StreamInfo
from ..config.settings import Settings
from ..errors import ConfigurationError, RequestDenied, TopologyError
from ..inspection import OrphanFacts, SubscriberFacts
from ..messages.subjects import covers
from .facts import ConsumerFacts, Facts, OutboxFacts, ServerFacts, StreamFacts

if TYPE_CHECKING:
    from ..outbox.store import OutboxStore
    from ..subscribing.subscription import Subscription

#: Seconds to wait for a page of the server's monitoring.
MONITOR_TIMEOUT = 3.0
#: Nanoseconds of a second; the server writes durations in nanoseconds.
NANO = 1_000_000_000


def gather(
    broker: Broker,
    settings: Settings,
    wanted: Sequence[StreamConfig],
    subscriptions: Sequence[Subscription],
    store: OutboxStore | None,
    monitor_url: str | None = None,
) -> Facts:
    """Ask for everything that the checks need. Nothing is changed.

    :param wanted: the streams that the application needs.
    :param subscriptions: all that the application has.
    :param store: of the outbox; None if the application has none.
    :raises ConfigurationError: ``monitor_url`` is not an HTTP address.
    :raises BrokerError: the server did not answer.
    :raises DatabaseError: the database failed.
    """
    streams = {stream.name: broker.stream_info(stream.name) for stream in wanted}
    setup, problem = _setup(broker, wanted)
    subscribers = inspection.subscribers(settings, subscriptions, broker)
    places = [one.place for one in subscribers if one.place.stream == settings.stream]
    return Facts(
        server=_server(broker, monitor_url),
        streams=tuple(_stream(name, info, settings) for name, info in streams.items()),
        consumers=tuple(map(_consumer, subscribers)),
        orphans=_orphans(broker, settings, subscriptions),
        outbox=None if store is None else _outbox(store, settings),
        setup=setup,
        setup_problem=problem,
        unbound=_unbound(streams.get(settings.stream), places),
        allow_volatile=settings.allow_volatile_streams,
    )


def _setup(
    broker: Broker, wanted: Sequence[StreamConfig]
) -> tuple[tuple[tuple[str, str, str], ...], str]:
    try:
        changes = broker.setup(wanted, dry_run=True)
    except TopologyError as error:
        return (), str(error)
    return tuple((change.action, change.stream, change.detail) for change in changes), ""


def _stream(name: str, info: StreamInfo | None, settings: Settings) -> StreamFacts:
    is_main = name == settings.stream
    if info is None:
        return StreamFacts(name=name, exists=False, is_main=is_main)
    names = ("storage", "replicas", "discard", "retention", "duplicate_window", "max_age")
    values: dict[str, Any] = {key: getattr(info.config, key) for key in names}
    return StreamFacts(name=name, is_main=is_main, persist_mode=info.persist_mode, **values)


def _consumer(facts: SubscriberFacts) -> ConsumerFacts:
    return ConsumerFacts(
        name=facts.subscription.name,
        exists=facts.consumer is not None,
        missing_subjects=facts.missing_subjects,
        extra_subjects=facts.extra_subjects,
        ack_wait=facts.subscription.ack_wait,
        timeout=facts.subscription.timeout,
        inbox=facts.subscription.inbox,
    )


def _orphans(
    broker: Broker, settings: Settings, subscriptions: Sequence[Subscription]
) -> tuple[OrphanFacts, ...]:
    try:
        return inspection.orphaned_consumers(settings, subscriptions, broker)
    except RequestDenied:
        return ()  # a user who may not list consumers needs no finding about them


def _unbound(info: StreamInfo | None, consumers: Sequence[ConsumerConfig]) -> tuple[str, ...]:
    """Return the subjects that subscribers want and the stream, if there is one, does not store."""
    if info is None or info.origins:  # the server does not tell the subjects of its origins
        return ()
    subjects = info.config.subjects
    return tuple(
        wanted
        for one in consumers
        for wanted in one.filter_subjects
        if not any(covers(own, wanted) or covers(wanted, own) for own in subjects)
    )


def _outbox(store: OutboxStore, settings: Settings) -> OutboxFacts:
    rows = inspection.outbox_rows(store)
    return OutboxFacts(
        retention=settings.outbox_retention,
        inbox_retention=settings.inbox_retention,
        pending=rows.pending,
        parked=rows.parked,
        oldest_pending=rows.oldest_pending_seconds,
        has_relay=bool(inspection.partition_leases(store)),
        savepoints=store.database.keeps_savepoints(),
        rewound=tuple((one.name, one.reason) for one in inspection.rewound_streams(store)),
    )


# --- the server's monitoring


def _server(broker: Broker, monitor_url: str | None) -> ServerFacts:
    if monitor_url is None:
        return ServerFacts(version=broker.server_version)
    try:
        varz, jsz = _fetch(monitor_url, "varz"), _fetch(monitor_url, "jsz")
        return server_facts(varz, jsz, broker.server_version)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"[:200]
        return ServerFacts(version=broker.server_version, monitor_problem=problem)


def server_facts(varz: dict[str, Any], jsz: dict[str, Any], version: str) -> ServerFacts:
    """Read the pages ``/varz`` and ``/jsz``.

    :param version: the connection's, used if the pages have none.
    """
    config = (varz.get("jetstream") or {}).get("config") or jsz.get("config") or {}
    interval = config.get("sync_interval")
    members = (jsz.get("meta_cluster") or {}).get("cluster_size")
    routes = len((varz.get("cluster") or {}).get("urls") or ())
    return ServerFacts(
        version=str(varz.get("version") or version),
        sync_interval=interval / NANO if interval else None,
        sync_always=bool(config.get("sync_always", False)) if config else None,
        cluster_size=int(members) if members else max(1, routes),
    )


def _fetch(url: str, page: str) -> dict[str, Any]:
    if urlsplit(url).scheme not in ("http", "https"):
        raise ConfigurationError(
            "The monitoring address is no HTTP address.", "Use one such as http://127.0.0.1:8222."
        )
    address = f"{url.rstrip('/')}/{page}"
    with urllib.request.urlopen(address, timeout=MONITOR_TIMEOUT) as response:  # noqa: S310
        found = json.load(response)
    if not isinstance(found, dict):
        raise ValueError(f"{page} is not an object")
    return found
