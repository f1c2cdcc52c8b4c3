"""The streams that an application needs, and how they differ from existing ones. No I/O.

The rules are those of the wire format. All applications of an environment share one main stream
and one dead letter stream. Missing subjects are added to an existing stream, and nothing else is
changed. Another stream with the same subjects is an error that names both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from ..config.parsers import DAY
from ..config.settings import Settings
from ..errors import TopologyError
from ..messages.subjects import covers, overlaps
from .base import Change, ConsumerConfig, StreamConfig, StreamInfo


def wanted_streams(settings: Settings, filters: Iterable[str] = ()) -> list[StreamConfig]:
    """Return the main stream, and the dead letter stream unless it is turned off.

    :param filters: the subjects to which the application subscribes. Events of another
        application are stored from now on, even if it has not been started yet.
    """
    subjects = [f"{settings.env}.events.>", f"{settings.env}.{settings.app_name}.>"]
    for subject in filters:
        env, _, rest = subject.partition(".")
        producer = rest.partition(".")[0]
        if env == settings.env and producer not in ("*", ">", "", "dlq"):
            subjects.append(f"{env}.{producer}.>")
    main = StreamConfig(
        name=settings.stream, subjects=tuple(dict.fromkeys(subjects)), max_age=7 * DAY
    )
    streams = [msgspec.structs.replace(main, **settings.stream_config)]
    if settings.use_dlq:
        letters = StreamConfig(
            name=settings.dead_letter_stream,
            subjects=(f"{settings.env}.dlq.>",),
            max_age=30 * DAY,
            storage=streams[0].storage,
            replicas=streams[0].replicas,
        )
        streams.append(msgspec.structs.replace(letters, **settings.dlq_stream_config))
    return streams


def refuse_volatile(info: StreamInfo | None, settings: Settings) -> None:
    """Refuse a stream for the outbox that does not store acknowledged messages on disk.

    :raises TopologyError: its messages are in memory, or acknowledged before they are written.
    """
    if info is None or settings.allow_volatile_streams:
        return
    if info.config.storage != "memory" and info.persist_mode != "async":
        return
    how = (
        "keeps messages in memory"
        if info.config.storage == "memory"
        else ("acknowledges messages before they are written (persist_mode async)")
    )
    raise TopologyError(
        f"The stream {info.config.name!r} {how}, and the outbox is on: what it acknowledges may "
        "be gone.",
        "Make it anew with file storage and persist_mode default, or set "
        "NATSPUBSUB_ALLOW_VOLATILE_STREAMS.",
    )


#: Metadata keys for the owner of a consumer (ADR-33).
OWNER_APP, OWNER_SUBSCRIBER = "natspubsub.app", "natspubsub.subscriber"


def owner_metadata(config: ConsumerConfig) -> dict[str, str]:
    """Return the metadata that names the owner of a consumer."""
    if not config.subscriber:
        return {}
    return {OWNER_APP: config.app, OWNER_SUBSCRIBER: config.subscriber}


def refuse_other_owner(config: ConsumerConfig, metadata: Mapping[str, str]) -> None:
    """Refuse a consumer of another subscriber, because each would receive part of the messages.

    :param metadata: the metadata of the existing consumer; an old one without metadata has no
        owner.
    :raises TopologyError: the consumer has another owner; names both.
    """
    app, subscriber = metadata.get(OWNER_APP), metadata.get(OWNER_SUBSCRIBER)
    # Within one app, different names have different consumers, or were refused before.
    if config.subscriber and app is not None and app != config.app:
        raise TopologyError(
            f"The consumer {config.durable!r} on the stream {config.stream!r} is that of the "
            f"subscriber {subscriber!r} of the app {app!r}, and the subscriber "
            f"{config.subscriber!r} of the app {config.app!r} would have the same one.",
            "Give one of them another name=...",
        )


def wakeup_subject(settings: Settings) -> str:
    """Return the subject of the relay's wake-up after a commit; it is outside every stream."""
    return f"natspubsub.wakeup.{settings.env}.{settings.app_name}"


def presence_subject(settings: Settings) -> str:
    """Return the subject on which workers ask each other for their needs of a consumer."""
    return f"natspubsub.consumers.{settings.env}.{settings.app_name}"


def plan(wanted: Sequence[StreamConfig], existing: Sequence[StreamInfo]) -> list[Change]:
    """Compare the wanted streams with those on the server.

    A wanted stream is left out if another *wanted* stream exists and has all of its subjects: the
    peers' packages create a main stream that also stores the dead letters.

    :returns: one or more changes for each wanted stream, in the order in which to apply them.
    :raises TopologyError: a stream that is not wanted has one of the subjects.
    """
    configs = {info.config.name: info.config for info in existing}
    mirrors = {info.config.name: info.origins for info in existing if info.is_mirror}
    names = {stream.name for stream in wanted}
    changes: list[Change] = []
    for stream in wanted:
        current = configs.get(stream.name)
        missing = uncovered(stream.subjects, current.subjects if current else ())
        others = [config for config in configs.values() if config.name != stream.name]
        host = _host(stream, [other for other in others if other.name in names])
        if current is None and host is not None:
            changes.append(Change("ok", host.name, f"keeps {', '.join(stream.subjects)} as well"))
            continue
        if stream.name in mirrors:
            changes.append(Change("ok", stream.name, f"mirrors {', '.join(mirrors[stream.name])}"))
            continue
        _refuse_overlap(stream.name, missing, others)
        changes += _changes_for(stream, current, missing)
    return changes


def _changes_for(
    stream: StreamConfig, current: StreamConfig | None, missing: tuple[str, ...]
) -> list[Change]:
    if current is None:
        return [Change("create", stream.name, ", ".join(stream.subjects), stream)]
    changes = []
    if missing:
        grown = msgspec.structs.replace(current, subjects=current.subjects + missing)
        changes.append(Change("add_subjects", stream.name, ", ".join(missing), grown))
    changes += [Change("differs", stream.name, text) for text in _differences(stream, current)]
    return changes or [Change("ok", stream.name)]


def _differences(wanted: StreamConfig, current: StreamConfig) -> Iterable[str]:
    if current.retention != wanted.retention:
        yield (
            f"retention is {current.retention!r}, not {wanted.retention!r}: with a workqueue "
            "stream (the Ruby package makes one) each message can be consumed once only, so "
            "two subscribers cannot both get it, and it cannot be replayed"
            if current.retention == "workqueue"
            else f"retention is {current.retention!r}, not {wanted.retention!r}"
        )
    for name in ("storage", "replicas"):
        have, want = getattr(current, name), getattr(wanted, name)
        if have != want:
            yield f"{name} is {have!r}, not {want!r}"


def uncovered(subjects: Iterable[str], by: Iterable[str]) -> tuple[str, ...]:
    """Return the subjects, or filters, that none of the filters ``by`` covers."""
    patterns = tuple(by)
    return tuple(
        subject for subject in subjects if not any(covers(pattern, subject) for pattern in patterns)
    )


def _host(stream: StreamConfig, candidates: Iterable[StreamConfig]) -> StreamConfig | None:
    for candidate in candidates:
        if not uncovered(stream.subjects, candidate.subjects):
            return candidate
    return None


def _refuse_overlap(name: str, subjects: Iterable[str], others: Iterable[StreamConfig]) -> None:
    for other in others:
        for subject in subjects:
            taken = [own for own in other.subjects if overlaps(own, subject)]
            if taken:
                raise TopologyError(
                    f"The stream {name!r} needs the subject {subject!r}, but the stream "
                    f"{other.name!r} already takes {taken[0]!r}.",
                    "Remove that subject from the other stream, or set NATSPUBSUB_STREAM_NAME "
                    f"to {other.name!r} to use it.",
                )
