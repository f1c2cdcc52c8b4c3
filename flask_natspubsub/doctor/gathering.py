"""Gathers what ``doctor`` goes by: from the broker, the server's monitoring and the database."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..brokers.base import Broker, ConsumerConfig, ConsumerInfo, StreamConfig, StreamInfo
from ..brokers.topology import OWNER_APP
from ..config.settings import Settings
from ..errors import ConfigurationError, RequestDenied, TopologyError
from ..messages.subjects import covers
from ..subscribing.durables import name_of, orphans
from .facts import ConsumerFacts, Facts, OrphanFacts, OutboxFacts, ServerFacts, StreamFacts

if TYPE_CHECKING:
    from ..outbox.store import OutboxStore
    from ..subscribing.subscription import Subscription

MONITOR_TIMEOUT = 3.0
NANO = 1_000_000_000


def gather(
    broker: Broker,
    settings: Settings,
    wanted: Sequence[StreamConfig],
    subscriptions: Sequence[Subscription],
    store: OutboxStore | None,
    monitor_url: str | None = None,
) -> Facts:
    """Ask for all that can be known. Nothing is changed.

    :param store: of the outbox; None if the application has none.
    :raises ConfigurationError: ``monitor_url`` is no HTTP address.
    :raises BrokerError: the server did not answer.
    :raises DatabaseError: the database failed.
    """
    infos = {stream.name: broker.stream_info(stream.name) for stream in wanted}
    setup, problem = _setup(broker, wanted)
    places = [broker.place(one.consumer_config(settings.stream)) for one in subscriptions]
    found = [broker.consumer_info(place.stream, place.durable) for place in places]
    return Facts(
        server=_server(broker, monitor_url),
        streams=tuple(_stream(name, infos[name], settings) for name in infos),
        consumers=tuple(map(_consumer, places, found, subscriptions)),
        orphans=_orphans(broker, settings, subscriptions),
        outbox=None if store is None else _outbox(store, settings),
        setup=setup,
        setup_problem=problem,
        unbound=_unbound(
            infos.get(settings.stream),
            [place for place in places if place.stream == settings.stream],
        ),
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


def _consumer(place: ConsumerConfig, info: ConsumerInfo | None, one: Subscription) -> ConsumerFacts:
    got = info.filter_subjects if info else place.filter_subjects
    return ConsumerFacts(
        name=one.name,
        exists=info is not None,
        missing_subjects=_uncovered(place.filter_subjects, got),
        extra_subjects=_uncovered(got, place.filter_subjects),
        ack_wait=one.ack_wait,
        timeout=one.timeout,
        inbox=one.inbox,
    )


def _uncovered(subjects: Iterable[str], by: Sequence[str]) -> tuple[str, ...]:
    return tuple(one for one in subjects if not any(covers(pattern, one) for pattern in by))


def _orphan(info: ConsumerInfo, retention: str, settings: Settings) -> OrphanFacts:
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


def _orphans(
    broker: Broker, settings: Settings, subscriptions: Sequence[Subscription]
) -> tuple[OrphanFacts, ...]:
    try:
        found = orphans(broker, settings, subscriptions)
    except RequestDenied:
        return ()  # who may not see them needs no word about them
    # One that a worker pulls from is known to an older or newer version of the code.
    found = [info for info in found if not info.waiting]
    streams = {info.stream: broker.stream_info(info.stream) for info in found}
    retention = {name: info.config.retention if info else "" for name, info in streams.items()}
    return tuple(_orphan(info, retention[info.stream], settings) for info in found)


def _unbound(info: StreamInfo | None, consumers: Sequence[ConsumerConfig]) -> tuple[str, ...]:
    """Return what subscribers want and the stream, if there is one, has no room for."""
    if info is None or info.origins:  # what it copies, it does not say
        return ()
    subjects = info.config.subjects
    return tuple(
        wanted
        for one in consumers
        for wanted in one.filter_subjects
        if not any(covers(own, wanted) or covers(wanted, own) for own in subjects)
    )


def _outbox(store: OutboxStore, settings: Settings) -> OutboxFacts:
    counts = store.counts()
    holders = store.leases.holders()
    return OutboxFacts(
        retention=settings.outbox_retention,
        inbox_retention=settings.inbox_retention,
        pending=counts["pending"],
        parked=counts["parked"],
        oldest_pending=counts["oldest_pending_seconds"],
        has_relay=any(
            one["name"].startswith("outbox/") and one["seconds_left"] > 0 for one in holders
        ),
        savepoints=store.database.keeps_savepoints(),
        rewound=tuple((one.name, one.reason) for one in store.streams.rewound()),
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
    """Read what ``/varz`` and ``/jsz`` say.

    :param version: what the connection says, should they not.
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
        raise ValueError(f"{page} is no object")
    return found
