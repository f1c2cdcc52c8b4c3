"""The durable consumers of an app: finding orphans, renaming, deleting.

A consumer is the position of one subscriber in the stream, found by the subscriber's name. After a
rename, a new consumer starts with everything that is stored, and the old one keeps its messages
for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from ..brokers.agreement import UNTIL
from ..brokers.base import Broker, ConsumerConfig, ConsumerInfo
from ..brokers.topology import OWNER_APP, OWNER_SUBSCRIBER
from ..config.settings import Settings
from ..errors import BrokerError, TopologyError
from ..messages.subjects import overlaps, slug
from .subscription import Subscription


class Renamed(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a rename.

    :param waiting: the number of messages that wait for the new name.
    :param again: at most this many of them were delivered to the old name, and may be handled.
    :param remembered: the number of inbox rows that count for the new name.
    """

    old: str
    new: str
    waiting: int
    again: int
    remembered: int


def place_of(broker: Broker, settings: Settings, subscription: Subscription) -> ConsumerConfig:
    """Return the consumer that a subscriber needs, on the stream that has its subjects."""
    return broker.place(subscription.consumer_config(settings.stream))


def orphans(
    broker: Broker, settings: Settings, subscriptions: Sequence[Subscription]
) -> list[ConsumerInfo]:
    """Return the app's consumers that no subscriber has.

    Consumers of version 0.1 have no metadata. One with the app's prefix in its name counts as the
    app's own, and may belong to an app with a longer name.

    :param subscriptions: all that the app has, not only those of one worker.
    """
    return _orphans(*_look(broker, settings, subscriptions), settings)


def _look(
    broker: Broker, settings: Settings, subscriptions: Sequence[Subscription]
) -> tuple[list[ConsumerInfo], list[ConsumerConfig]]:
    """Return the consumers of the streams that the app receives from, and those that it needs."""
    places = [place_of(broker, settings, one) for one in subscriptions]
    streams = dict.fromkeys((settings.stream, *(place.stream for place in places)))
    return [info for stream in streams for info in broker.consumers(stream)], places


def _orphans(
    found: Sequence[ConsumerInfo], places: Sequence[ConsumerConfig], settings: Settings
) -> list[ConsumerInfo]:
    declared = {(place.stream, place.durable) for place in places}
    return [
        info
        for info in found
        if (info.stream, info.durable) not in declared and _is_of(info, settings)
    ]


def _is_of(info: ConsumerInfo, settings: Settings) -> bool:
    """Whether a consumer is the app's own; on another team's stream, this environment's."""
    if UNTIL in info.metadata:
        return False  # a worker has made it for a while, and deletes it
    elsewhere = f"{settings.env}-{settings.app_name}-"
    if info.stream != settings.stream and not info.durable.startswith(elsewhere):
        return False
    owner = info.metadata.get(OWNER_APP)
    if owner is not None:
        return owner == settings.app_name
    return info.is_pull and info.durable.startswith((f"{settings.app_name}-", elsewhere))


def name_of(info: ConsumerInfo, app: str) -> str:
    """Return the name of the subscriber that a consumer was made for."""
    return info.metadata.get(OWNER_SUBSCRIBER) or info.durable.removeprefix(f"{app}-")


def complaints(
    broker: Broker, settings: Settings, subscriptions: Sequence[Subscription]
) -> list[str]:
    """Return a line for each orphaned consumer, and for each subscriber that is new to the server.

    :param subscriptions: all that the app has.
    """
    found, places = _look(broker, settings, subscriptions)
    app, known = settings.app_name, {(info.stream, info.durable) for info in found}
    left = _orphans(found, places, settings)
    newcomers = [
        one
        for one, place in zip(subscriptions, places, strict=True)
        if (place.stream, place.durable) not in known
        and one.deliver_policy == "all"
        and _has_stored(broker, place)
    ]
    return [
        *(_of_orphan(info, app) for info in left),
        *(_of_newcomer(one, left, app) for one in newcomers),
    ]


def _has_stored(broker: Broker, place: ConsumerConfig) -> bool:
    """Whether messages are stored that a new consumer starts with; True if reading is denied."""
    try:
        return any(
            next(iter(broker.messages(place.stream, subject)), None) is not None
            for subject in place.filter_subjects
        )
    except BrokerError:
        return True


def _of_orphan(info: ConsumerInfo, app: str) -> str:
    name = name_of(info, app)
    unsure = "" if OWNER_APP in info.metadata else " (unless it is another app's)"
    return (
        f"the consumer {info.durable!r} has no subscriber in the app {app!r} any more{unsure}; "
        f"{info.pending + info.ack_pending} messages wait for it. If {name!r} was renamed: "
        f"'flask natspubsub subscribers rename {name} NEW'; if it is gone: "
        f"'flask natspubsub subscribers delete {name}'"
    )


def _of_newcomer(one: Subscription, left: Sequence[ConsumerInfo], app: str) -> str:
    """Return a line that says where a new subscriber starts, and who may have handled that."""
    before = [
        name_of(info, app)
        for info in left
        if info.delivered
        and any(overlaps(a, b) for a in info.filter_subjects for b in one.filter_subjects)
    ]
    begins = f"the subscriber {one.name!r} is new and begins with all messages that are stored"
    if not before:
        return f"{begins}; deliver_policy='new' would begin with the next one"
    return (
        f"{begins}, also with those that {before[0]!r} has handled. If that is its old name, stop "
        f"the workers and run 'flask natspubsub subscribers delete {one.name}' and 'flask "
        f"natspubsub subscribers rename {before[0]} {one.name}'"
    )


def rename(
    broker: Broker,
    settings: Settings,
    old: str,
    new: Subscription,
    rename_inbox: Callable[[str, str, str], int],
) -> Renamed:
    """Move the position and the inbox rows of a subscriber to its new name.

    Can be called again after a failure.

    :param old: the name that no subscriber has any more.
    :param rename_inbox: ``(app, old, new)`` renames the inbox rows and returns their number.
    :raises TopologyError: there is no such consumer, a worker pulls from it, or the new one has
        been used.
    """
    place = place_of(broker, settings, new)
    before = _stopped_consumer(broker, settings, old, [place.stream])
    there = broker.consumer_info(place.stream, place.durable)
    if there is not None and (there.delivered or there.waiting):
        raise TopologyError(
            f"The subscriber {new.name!r} has begun already: it was given messages up to number "
            f"{there.delivered}.",
            f"Stop its workers, and delete that position first: 'flask natspubsub subscribers "
            f"delete {new.name}'.",
        )
    remembered = rename_inbox(settings.app_name, old, new.name)
    _move(broker, before, place)
    info = broker.consumer_info(place.stream, place.durable)
    return Renamed(
        old=old,
        new=new.name,
        waiting=info.pending if info else 0,
        again=max(0, before.delivered - before.ack_floor),
        remembered=remembered,
    )


def _stopped_consumer(
    broker: Broker, settings: Settings, name: str, streams: Iterable[str]
) -> ConsumerInfo:
    """Return a subscriber's consumer on one of the streams; TopologyError if a worker pulls."""
    own = f"{settings.app_name}-{slug(name)}"
    for stream in dict.fromkeys(streams):
        durable = own if stream == settings.stream else f"{settings.env}-{own}"
        info = broker.consumer_info(stream, durable)
        if info is None or not _is_of(info, settings):
            continue
        if info.waiting:
            raise TopologyError(
                f"A worker is pulling for the subscriber {name!r}.", "Stop it, and try again."
            )
        return info
    raise TopologyError(
        f"The app {settings.app_name!r} has no consumer of a subscriber {name!r}.",
        "'flask natspubsub subscribers' lists them.",
    )


def _move(broker: Broker, before: ConsumerInfo, place: ConsumerConfig) -> None:
    """Make the new consumer start where the old one stopped, and delete the old one."""
    stream = broker.stream_info(before.stream)
    if stream is not None and stream.config.retention == "workqueue":
        # It stores unsettled messages only, and allows one consumer for each subject.
        broker.delete_consumer(before.stream, before.durable)
        broker.add_consumer(place)
        return
    broker.delete_consumer(place.stream, place.durable)
    begin = {"deliver_policy": "all", "start_after": before.ack_floor}
    broker.add_consumer(msgspec.structs.replace(place, **begin))
    broker.delete_consumer(before.stream, before.durable)


def delete(
    broker: Broker,
    settings: Settings,
    name: str,
    subscriptions: Sequence[Subscription],
    confirm: Callable[[ConsumerInfo], object],
) -> ConsumerInfo:
    """Delete the position of a subscriber, and return the deleted consumer.

    :param subscriptions: those of the app; they tell which streams to search.
    :param confirm: called before the deletion; may raise to prevent it.
    :raises TopologyError: there is no such consumer, or a worker pulls from it.
    """
    elsewhere = [place_of(broker, settings, one).stream for one in subscriptions]
    info = _stopped_consumer(broker, settings, name, [settings.stream, *elsewhere])
    confirm(info)
    broker.delete_consumer(info.stream, info.durable)
    return info
