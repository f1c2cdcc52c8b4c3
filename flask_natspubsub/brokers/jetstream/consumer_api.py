"""Durable consumers at the server: made, or changed in place as far as they may be.

The consumer may be shared with other versions of this application (see ``agreement``), may
belong to somebody who lets us use it and not change it, and has to keep to the limits of its
stream, account and server. What does not fit is an error that names it; what fits with a
difference is noted in the report, under ``notes``.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from ...errors import RequestDenied, TopologyError
from ...messages.subjects import covers, overlaps
from ..agreement import CROWDED_GRACE, GRACE, Needs, is_outdated, with_newest
from ..base import ConsumerConfig, ConsumerInfo
from ..topology import owner_metadata, refuse_other_owner
from .api import STREAM_NOT_FOUND, Api, ApiError, Json

CONSUMER_NOT_FOUND = 10014
MAX_CONSUMERS = (10002, 10026)
MAX_ACK_PENDING = 10121
NOT_UNIQUE = (10099, 10100)
NANO = 1_000_000_000
#: The prefix of what the server itself writes into the metadata of a consumer.
SERVER_METADATA = "_nats."
_MISSING = (CONSUMER_NOT_FOUND, STREAM_NOT_FOUND)
#: The server's default of max_ack_pending.
_DEFAULT_ACK_PENDING = 1000

#: Asks whether a running process needs more than this; None if that cannot be asked.
Others = Callable[[Needs], Awaitable[bool | None]]


class Floor(NamedTuple):
    """Up to which sequence a consumer has settled everything, in the stream created then.

    Streams that are made anew reuse names and sequences.
    """

    stream_created: str = ""
    sequence: int = 0


class Standing(NamedTuple):
    """What is known of a consumer beside the server's report.

    :param after: the floor of an earlier consumer of this name, in case it is gone.
    :param others: asks the other processes.
    :param starting: whether this process begins with it now.
    :param unneeded: seconds since when nobody has needed what this process does not.
    :param grace: the value of ``unneeded`` from which an older declaration may take that away.
    """

    after: Floor = Floor()
    others: Others | None = None
    starting: bool = True
    unneeded: float = 0.0
    grace: float = GRACE


FIRST = Standing()


class PullLimits(NamedTuple):
    """The limits of one pull request; durations are nanoseconds, a ``batch`` of 0 is no limit."""

    batch: int
    expires: int
    heartbeat: int

    @classmethod
    def of(cls, config: Mapping[str, Any], expires: float, heartbeat: float) -> PullLimits:
        """Keep ``expires`` and ``heartbeat``, in seconds, within the limits of a consumer.

        :param config: its configuration as the server reports it.
        """
        longest = int(expires * NANO)
        longest = min(longest, config.get("max_expires") or longest)
        # The server refuses a heartbeat that could not come twice.
        return cls(config.get("max_batch") or 0, longest, min(int(heartbeat * NANO), longest // 3))


class ConsumerApi(Api):
    """Asks the server about consumers, and makes and changes them."""

    async def consumer(self, stream: str, durable: str) -> Json | None:
        """Return the raw report on a consumer."""
        return await self.find(f"CONSUMER.INFO.{stream}.{durable}", None, _MISSING)

    async def consumers(self, stream: str) -> list[Json]:
        """Return the raw reports on all durable consumers of a stream, by name."""
        found = await self.pages(f"CONSUMER.LIST.{stream}", "consumers")
        durable = [report for report in found if report["config"].get("durable_name")]
        return sorted(durable, key=lambda report: str(report["name"]))

    async def delete_consumer(self, stream: str, durable: str) -> bool:
        """Delete a consumer; False if there was none."""
        return await self.find(f"CONSUMER.DELETE.{stream}.{durable}", None, _MISSING) is not None

    async def place(self, config: ConsumerConfig) -> ConsumerConfig:
        """Return the config with the stream that stores its subjects, and the name there."""
        if not config.elsewhere:
            return config
        if _stores_one_of(await self.stream(config.stream), config.filter_subjects):
            return config
        found: set[str] = set()
        for subject in config.filter_subjects:
            try:
                page = await self.call("STREAM.NAMES", {"subject": subject})
            except RequestDenied:
                return config  # its stream's error says what is missing there
            found.update(page.get("streams") or ())
        if len(found) > 1:
            raise TopologyError(
                f"The subscriber {config.durable!r} wants {', '.join(config.filter_subjects)}, of "
                f"which several streams have something: {', '.join(sorted(found))}.",
                "Name one of them with stream='...', and declare a subscriber for each other.",
            )
        if not found:
            return config
        return msgspec.structs.replace(config, stream=found.pop(), durable=config.elsewhere)

    async def ensure_consumer(self, config: ConsumerConfig, standing: Standing = FIRST) -> Json:
        """Create the consumer, or change it in place where it lacks something.

        :returns: the raw report, with the ``stream_created`` of its stream, ``notes`` for people,
            and whether it is used as it is because we may not change it: ``foreign``.
        :raises TopologyError: no such stream, or one that does not cover a filter subject: the
            server would accept such a consumer, which then never gets anything; or a consumer
            that we cannot use and may not change.
        """
        stream = await self.stream(config.stream)
        limits = _limits(config, stream)
        current = await self.consumer(config.stream, config.durable)
        if current is None:
            wanted = consumer_body(config, _start(config, stream, standing.after, limits))
            wanted["metadata"] = _written_on(config)
        else:
            _refuse_unusable(config, current["config"])
            have = _comparable(current["config"])
            refuse_other_owner(config, have["metadata"])
            # What is handed back waits with the rest for its acknowledgement.
            crowded = 2 * current.get("num_ack_pending", 0) >= have["max_ack_pending"]
            standing = standing._replace(grace=CROWDED_GRACE if crowded else GRACE)
            wanted = await self._goal(config, have, standing)
        _keep_to(limits, wanted)
        notes = [*limits.notes, *_server_limits(config, stream)]
        if current is None or any(have.get(key) != value for key, value in wanted.items()):
            current = await self._write(config, current, wanted, notes)
        created = str((stream or {}).get("created", ""))
        return {"foreign": False, **current, "stream_created": created, "notes": notes}

    async def _goal(self, config: ConsumerConfig, have: Json, standing: Standing) -> Json:
        """Return what an existing consumer should be."""
        mine, theirs = Needs.of(config), needs_of(have)
        metadata: Mapping[str, str] = have.get("metadata") or {}
        outdated = is_outdated(mine, metadata)
        needs = mine
        if not mine.covers(theirs) and await _must_keep(mine, outdated, standing):
            needs = mine.joined(theirs)
        elif outdated and standing.unneeded >= standing.grace:
            outdated = False  # it was rolled back: this declaration is the newest again
        if not outdated:
            metadata = with_newest(mine, theirs, {**metadata, **_written_on(config)})
        body = consumer_body(_with(config, needs), {})
        kept = ("deliver_policy", "opt_start_seq", "replay_policy", "durable_name", "name")
        goal = {key: value for key, value in body.items() if key not in kept}
        if set(goal["filter_subjects"]) == set(theirs.filter_subjects):
            goal["filter_subjects"] = list(theirs.filter_subjects)
        return goal | {"metadata": dict(metadata), "backoff": []}

    async def _write(
        self, config: ConsumerConfig, current: Json | None, wanted: Json, notes: list[str]
    ) -> Json:
        body = wanted if current is None else _comparable(current["config"]) | wanted
        try:
            return await self._create(config, body, notes)
        except RequestDenied as error:
            problem = _unfit(config, current, str(error))
        except ApiError as error:
            problem = _unfit(config, current, str(error), error)
        if problem is not None:
            raise problem
        assert current is not None
        notes += _differences(current["config"], wanted)
        return current | {"foreign": True}

    async def _create(self, config: ConsumerConfig, body: Json, notes: list[str]) -> Json:
        verb = f"CONSUMER.CREATE.{config.stream}.{config.durable}"
        if not body.get("backoff"):
            body.pop("backoff", None)
        try:
            return await self.call(verb, {"stream_name": config.stream, "config": body})
        except ApiError as error:
            allowed = re.search(r"limit of (\d+)", error.description)
            if error.err_code != MAX_ACK_PENDING or allowed is None:
                raise
        limit = int(allowed[1])
        notes.append(_clamped(config, limit, "the server's or the account's max_ack_pending"))
        body = body | {"max_ack_pending": limit}
        return await self.call(verb, {"stream_name": config.stream, "config": body})


async def _must_keep(mine: Needs, outdated: bool, standing: Standing) -> bool:
    """Whether what the consumer has more than we need has to stay."""
    needed = await standing.others(mine) if standing.others is not None else False
    if outdated:  # who needs it may just be starting anew
        return needed is True or standing.unneeded < standing.grace
    if needed is None:
        return not standing.starting
    return needed


def _written_on(config: ConsumerConfig) -> dict[str, str]:
    return {**config.metadata, **owner_metadata(config)}


def _with(config: ConsumerConfig, needs: Needs) -> ConsumerConfig:
    return msgspec.structs.replace(config, **msgspec.structs.asdict(needs))


def needs_of(config: Mapping[str, Any]) -> Needs:
    """Return what a consumer gives, as the server reports its configuration."""
    single = config.get("filter_subject")
    filters = (single,) if single else tuple(config.get("filter_subjects") or (">",))
    return Needs(
        filters,
        config.get("ack_wait", 30 * NANO) / NANO,
        config.get("max_ack_pending", _DEFAULT_ACK_PENDING),
    )


def _comparable(config: Json) -> Json:
    """Bring a reported configuration into the form in which we write it."""
    have = {"backoff": [], "max_ack_pending": _DEFAULT_ACK_PENDING, **config}
    if "filter_subject" in have:
        have["filter_subjects"] = [have.pop("filter_subject")]
    metadata = have.get("metadata") or {}
    have["metadata"] = {k: v for k, v in metadata.items() if not k.startswith(SERVER_METADATA)}
    return have


# --- what a stream takes


class _Limits(NamedTuple):
    """What the stream of a consumer allows, and what had to be changed for it."""

    deliver_all: bool
    max_ack_pending: int
    notes: list[str]


def _limits(config: ConsumerConfig, stream: Json | None) -> _Limits:
    """Check the filters, and find what the stream allows its consumers."""
    _check_filters(config, stream)
    settings = (stream or {}).get("config") or {}
    limit = (settings.get("consumer_limits") or {}).get("max_ack_pending") or 0
    notes: list[str] = []
    if 0 < limit < config.max_ack_pending:
        notes.append(_clamped(config, limit, f"consumer_limits of the stream {config.stream!r}"))
    deliver_all = settings.get("retention") == "workqueue"
    if deliver_all and config.deliver_policy != "all":
        notes.append(
            f"deliver_policy {config.deliver_policy!r} is not for a work queue: the consumer "
            "starts with all that is in the stream"
        )
    return _Limits(deliver_all, limit, notes)


def _clamped(config: ConsumerConfig, limit: int, whose: str) -> str:
    return (
        f"max_ack_pending is {limit}, not {config.max_ack_pending}: {whose} allows no more. So "
        "many messages at once are with all its workers together; raise the limit if that is "
        "too few"
    )


def _keep_to(limits: _Limits, body: Json) -> None:
    if 0 < limits.max_ack_pending < body["max_ack_pending"]:
        body["max_ack_pending"] = limits.max_ack_pending
    if limits.deliver_all and "deliver_policy" in body:
        body["deliver_policy"] = "all"


def _server_limits(config: ConsumerConfig, stream: Json | None) -> Iterator[str]:
    settings = (stream or {}).get("config") or {}
    threshold = (settings.get("consumer_limits") or {}).get("inactive_threshold") or 0
    if threshold:
        yield (
            f"consumer_limits of the stream {config.stream!r} has an inactive_threshold: the "
            f"server deletes this consumer, and with it how far it is, when no worker runs for "
            f"{threshold / NANO:g} s"
        )


def _start(config: ConsumerConfig, stream: Json | None, after: Floor, limits: _Limits) -> Json:
    """Return where a consumer begins that is made anew; empty for where it is declared to."""
    # A rewound stream gives the same sequences again: none may be left out. And a work queue
    # keeps only what nobody has settled.
    last = ((stream or {}).get("state") or {}).get("last_seq", after.sequence)
    known = after.stream_created == (stream or {}).get("created") and after.sequence <= last
    start = after.sequence if known else config.start_after
    if limits.deliver_all or not start:
        return {}
    return {"deliver_policy": "by_start_sequence", "opt_start_seq": start + 1}


def _stores_one_of(stream: Json | None, filters: tuple[str, ...]) -> bool:
    subjects = (stream or {}).get("config", {}).get("subjects") or []
    return any(overlaps(own, wanted) for own in subjects for wanted in filters)


def _check_filters(config: ConsumerConfig, stream: Json | None) -> None:
    if stream is None:
        raise TopologyError(
            f"There is no stream {config.stream!r} for the subscriber {config.durable!r}.",
            "Run `flask natspubsub setup`, or turn NATSPUBSUB_AUTO_SETUP on.",
        )
    settings = stream["config"]
    if settings.get("mirror") or settings.get("sources"):
        return  # it has what others store: which subjects, only they know
    subjects = settings.get("subjects") or []
    for wanted in config.filter_subjects:
        if not any(overlaps(subject, wanted) for subject in subjects):
            raise TopologyError(
                f"The subscriber {config.durable!r} wants {wanted!r}, but the stream "
                f"{config.stream!r} stores only {', '.join(subjects)}: it would get nothing.",
                "Check topics, producer and NATSPUBSUB_ENV, name another stream with stream='...', "
                "or run `flask natspubsub setup` for the application that publishes them.",
            )


# --- what belongs to others


def _refuse_unusable(config: ConsumerConfig, have: Json) -> None:
    """Refuse a consumer that nobody could change into one that we can use."""
    if have.get("deliver_subject"):
        what = "pushes to a subject, and a worker pulls"
    elif have.get("ack_policy") != "explicit":
        what = f"has ack_policy {have.get('ack_policy')!r}, and each message is acknowledged"
    else:
        return
    raise TopologyError(
        f"The consumer {config.durable!r} on {config.stream!r} {what}.",
        "Delete it, or give the subscriber another name with name='...'.",
    )


def _unfit(
    config: ConsumerConfig, current: Json | None, why: str, error: ApiError | None = None
) -> Exception | None:
    """Return the error of a consumer that could not be written; None if it fits as it is."""
    name = f"the consumer {config.durable!r} on the stream {config.stream!r}"
    if error is not None and (current is None or error.err_code in NOT_UNIQUE):
        return _explained(name, error)
    if current is None:
        return TopologyError(
            f"There is no consumer {config.durable!r} on the stream {config.stream!r}, and it "
            f"cannot be made: {why}",
            "Let somebody who may make it, with ack_policy explicit, max_deliver -1 and the filter "
            f"subjects {', '.join(config.filter_subjects)}; or grant this user to publish to "
            f"$JS.API.CONSUMER.CREATE.{config.stream}.{config.durable}.>.",
        )
    given = needs_of(current["config"]).filter_subjects
    lacking = [one for one in config.filter_subjects if not any(covers(own, one) for own in given)]
    if not lacking:
        return None
    return TopologyError(
        f"There is {name}, which does not get {', '.join(lacking)}, and it cannot be changed: "
        f"{why}",
        "Let somebody who may add these to its filter subjects.",
    )


def _explained(name: str, error: ApiError) -> Exception:
    if error.err_code in MAX_CONSUMERS:
        return TopologyError(
            f"There is no room for {name}: {error.description}.",
            "Raise max_consumers of the stream or the account, or delete consumers that nobody "
            "uses; `flask natspubsub doctor` names those of this app.",
        )
    if error.err_code in NOT_UNIQUE:
        return TopologyError(
            f"The stream of {name} is a work queue, and another consumer has some of its "
            f"subjects: {error.description}.",
            "On a work queue each subject has one consumer. Delete the other one, or give the "
            "stream retention limits or interest.",
        )
    return error


def _differences(have: Json, wanted: Json) -> list[str]:
    """Say how a consumer that cannot be changed differs from what is wanted."""
    found = []
    for key in ("ack_wait", "max_ack_pending", "max_deliver", "backoff"):
        is_, want = _comparable(have).get(key), wanted.get(key)
        if is_ != want:
            shown = (is_ / NANO, want / NANO) if key == "ack_wait" else (is_, want)  # type: ignore[operator]
            found.append(f"{key} is {_text(shown[0])}, not {_text(shown[1])}")
    if (have.get("max_deliver") or -1) > 0:
        found.append(
            "with a max_deliver of its own the server gives a message up before the worker does: "
            "it becomes no dead letter"
        )
    return [f"it belongs to others and is used as it is: {', '.join(found)}"] if found else []


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- what is written and read


def consumer_body(config: ConsumerConfig, start: Json) -> Json:
    """Turn a consumer's configuration into the server's JSON."""
    deliver_policy: Literal["all", "new", "last"] = config.deliver_policy
    return {
        "durable_name": config.durable,
        "name": config.durable,
        "ack_policy": "explicit",
        "replay_policy": "instant",
        "deliver_policy": deliver_policy,
        "ack_wait": int(config.ack_wait * NANO),
        "max_deliver": -1,
        "max_ack_pending": config.max_ack_pending,
        "filter_subjects": list(config.filter_subjects),
        **start,
    }


def consumer_info(report: Json) -> ConsumerInfo:
    """Turn the server's report on a consumer into ours."""
    config, delivered = report["config"], report.get("delivered") or {}
    single = config.get("filter_subject")
    return ConsumerInfo(
        stream=report["stream_name"],
        durable=report["name"],
        filter_subjects=(single,) if single else tuple(config.get("filter_subjects") or ()),
        delivered=delivered.get("stream_seq", 0),
        ack_floor=(report.get("ack_floor") or {}).get("stream_seq", 0),
        created=report.get("created", ""),
        last_active=delivered.get("last_active") or "",
        metadata=_comparable(config)["metadata"],
        is_pull=not config.get("deliver_subject"),
        pending=report.get("num_pending", 0),
        ack_pending=report.get("num_ack_pending", 0),
        redelivered=report.get("num_redelivered", 0),
        waiting=report.get("num_waiting", 0),
    )
