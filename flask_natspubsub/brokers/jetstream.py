"""The JetStream API as requests and JSON, close to the bytes.

Stream and consumer configurations are kept as the server sent them: what this package does
not know of (options of a newer server, say) survives an update. The API and its error codes
are those of the server's JetStream API reference.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, cast

from ..errors import BrokerError, TopologyError
from ..messages.codec import decode_value, encode_value
from ..messages.ids import parse_timestamp
from ..messages.subjects import overlaps
from . import topology
from .base import (
    Change,
    ConsumerConfig,
    ConsumerInfo,
    StoredMessage,
    StreamConfig,
    StreamInfo,
)
from .wire import check_subject, parse_headers

STREAM_NOT_FOUND = 10059
STREAM_NAME_IN_USE = 10058
CONSUMER_NOT_FOUND = 10014
MESSAGE_NOT_FOUND = 10037
SETUP_LOCK_SECONDS = 10.0
#: So many messages, of a megabyte each perhaps, are read at once.
READ_AT_ONCE = 16
#: What the server itself writes into the metadata of a consumer begins so.
SERVER_METADATA = "_nats."
NANO = 1_000_000_000

Request = Callable[[str, bytes], Awaitable[bytes]]
Json = dict[str, Any]


class Floor(NamedTuple):
    """How far a consumer has settled everything, and of which stream: names are reused."""

    stream_created: str = ""
    sequence: int = 0


class ApiError(BrokerError):
    """The JetStream API answered with an error."""

    def __init__(self, verb: str, error: Json) -> None:
        super().__init__(f"JetStream refused {verb}: {error.get('description', error)}.")
        self.err_code = int(error.get("err_code", 0))


class JetStreamApi:
    """Asks the server about streams, consumers and messages, and changes them."""

    def __init__(self, request: Request) -> None:
        self._request = request

    async def call(self, verb: str, body: Json | None = None) -> Json:
        """Call ``$JS.API.<verb>``; ApiError if the server says no."""
        payload = encode_value(body) if body is not None else b""
        subject = check_subject(f"$JS.API.{verb}")
        reply = cast(Json, decode_value(await self._request(subject, payload)))
        if "error" in reply:
            raise ApiError(verb, reply["error"])
        return reply

    async def find(self, verb: str, body: Json | None, missing: Sequence[int]) -> Json | None:
        """Call, with None for the error codes that mean that it is not there."""
        try:
            return await self.call(verb, body)
        except ApiError as error:
            if error.err_code in missing:
                return None
            raise

    # --- streams

    async def stream(self, name: str) -> Json | None:
        """Return the raw report on a stream."""
        return await self.find(f"STREAM.INFO.{name}", None, [STREAM_NOT_FOUND])

    async def streams(self) -> list[Json]:
        """Return the raw reports on all streams."""
        found: list[Json] = []
        while True:
            page = await self.call("STREAM.LIST", {"offset": len(found)})
            found += page.get("streams") or []
            if len(found) >= page.get("total", 0) or not page.get("streams"):
                return found

    async def setup(self, wanted: Sequence[StreamConfig], *, dry_run: bool) -> list[Change]:
        """Bring the streams up to what is wanted; see ``topology.plan``."""
        changes = topology.plan(wanted, await self._existing(wanted))
        if dry_run or not _writes(changes):
            return changes
        lock = await self._lock_setup(wanted[0].name)
        try:
            changes = topology.plan(wanted, await self._existing(wanted))
            for change in _writes(changes):
                await self._apply(change)
        finally:
            if lock:
                await self.find(f"STREAM.DELETE.{lock}", None, [STREAM_NOT_FOUND])
        return changes

    async def _existing(self, wanted: Sequence[StreamConfig]) -> list[StreamInfo]:
        """Look at the named streams only, and at all only if one has to change."""
        named = await asyncio.gather(*(self.stream(stream.name) for stream in wanted))
        infos = [stream_info(report) for report in named if report]
        settled = len(infos) == len(wanted) and not _writes(topology.plan(wanted, infos))
        return infos if settled else [stream_info(report) for report in await self.streams()]

    async def _apply(self, change: Change) -> None:
        assert change.config is not None
        if change.action == "create":
            await self.call(f"STREAM.CREATE.{change.stream}", stream_body(change.config))
            return
        report = await self.stream(change.stream)
        if report is not None:
            body = report["config"] | {"subjects": list(change.config.subjects)}
            await self.call(f"STREAM.UPDATE.{change.stream}", body)

    async def _lock_setup(self, stream: str) -> str | None:
        """Take turns with other processes: two that add subjects at once would undo each other.

        The server has no compare-and-set for streams, but creating one is atomic: the lock is
        a small stream in memory whose description names its owner. One left behind by a crash
        is removed after some seconds. Without the permission to do this there is no lock.
        """
        name = f"{stream}-setup"
        body = stream_body(
            StreamConfig(name=name, subjects=(f"_natspubsub.setup.{stream}",), storage="memory")
        ) | {"description": secrets.token_hex(8)}
        deadline = asyncio.get_running_loop().time() + SETUP_LOCK_SECONDS
        while True:
            try:
                await self.call(f"STREAM.CREATE.{name}", body)
                return name
            except ApiError as error:
                if error.err_code != STREAM_NAME_IN_USE:
                    return None
            if asyncio.get_running_loop().time() > deadline:
                await self.find(f"STREAM.DELETE.{name}", None, [STREAM_NOT_FOUND])
            await asyncio.sleep(0.05 + secrets.randbelow(100) / 1000)

    # --- consumers

    async def consumer(self, stream: str, durable: str) -> Json | None:
        """Return the raw report on a consumer."""
        missing = [CONSUMER_NOT_FOUND, STREAM_NOT_FOUND]
        return await self.find(f"CONSUMER.INFO.{stream}.{durable}", None, missing)

    async def consumers(self, stream: str) -> list[Json]:
        """Return the raw reports on all durable consumers of a stream, by name."""
        found: list[Json] = []
        while True:
            query = {"offset": len(found)}
            page = await self.find(f"CONSUMER.LIST.{stream}", query, [STREAM_NOT_FOUND]) or {}
            found += page.get("consumers") or []
            if len(found) >= page.get("total", 0) or not page.get("consumers"):
                break
        durable = [report for report in found if report["config"].get("durable_name")]
        return sorted(durable, key=lambda report: str(report["name"]))

    async def ensure_consumer(self, config: ConsumerConfig, *, after: Floor) -> Json:
        """Create the consumer, or update it in place where it differs.

        :param after: how far an earlier consumer of this name had got, should it have been
            deleted.
        :returns: the raw report, with the ``stream_created`` of its stream.
        :raises TopologyError: no such stream, or one that does not cover a filter subject: the
            server would accept such a consumer, which then never gets anything.
        """
        stream = await self.stream(config.stream)
        created = _check_filters(config, stream)
        # A stream that has lost its end gives the same numbers again: none may be left out.
        last = ((stream or {}).get("state") or {}).get("last_seq", after.sequence)
        known = after.stream_created == created and after.sequence <= last
        start = after.sequence if known else config.start_after
        wanted = consumer_body(config, start)
        current = await self.consumer(config.stream, config.durable)
        if current is not None:
            metadata = current["config"].get("metadata") or {}
            topology.refuse_other_owner(config, metadata)
            wanted["metadata"] = metadata | wanted["metadata"]
            kept = {"deliver_policy", "opt_start_seq", "replay_policy"}
            changed = {k: v for k, v in wanted.items() if k not in kept}
            have = {"metadata": {}, **current["config"]}
            if "filter_subject" in have:
                have["filter_subjects"] = [have.pop("filter_subject")]
            if all(have.get(key) == value for key, value in changed.items()):
                return current | {"stream_created": created}
            wanted = have | changed
        report = await self.call(
            f"CONSUMER.CREATE.{config.stream}.{config.durable}",
            {"stream_name": config.stream, "config": wanted},
        )
        return report | {"stream_created": created}

    async def delete_consumer(self, stream: str, durable: str) -> bool:
        """Delete a consumer; False if there was none."""
        missing = [CONSUMER_NOT_FOUND, STREAM_NOT_FOUND]
        return await self.find(f"CONSUMER.DELETE.{stream}.{durable}", None, missing) is not None

    # --- messages

    async def message(self, stream: str, query: Json) -> StoredMessage | None:
        """Read one message: by ``seq``, ``last_by_subj``, or ``seq`` and ``next_by_subj``."""
        missing = [MESSAGE_NOT_FOUND, STREAM_NOT_FOUND]
        reply = await self.find(f"STREAM.MSG.GET.{stream}", query, missing)
        return None if reply is None else _stored_message(stream, reply["message"])

    async def messages(self, places: Sequence[tuple[str, int]]) -> list[StoredMessage | None]:
        """Read several messages, each by stream and sequence, some at a time."""
        found: list[StoredMessage | None] = []
        for start in range(0, len(places), READ_AT_ONCE):
            some = places[start : start + READ_AT_ONCE]
            asked = (self.message(stream, {"seq": sequence}) for stream, sequence in some)
            found += await asyncio.gather(*asked)
        return found

    async def delete_message(self, stream: str, sequence: int) -> bool:
        """Delete one message; False if it was gone."""
        body = {"seq": sequence, "no_erase": True}
        try:
            await self.call(f"STREAM.MSG.DELETE.{stream}", body)
        except ApiError as error:
            if error.err_code in (MESSAGE_NOT_FOUND, 10043, 10057, STREAM_NOT_FOUND):
                return False
            raise
        return True


def _writes(changes: Sequence[Change]) -> list[Change]:
    return [change for change in changes if change.action in ("create", "add_subjects")]


def _check_filters(config: ConsumerConfig, stream: Json | None) -> str:
    """Return when the stream was created."""
    if stream is None:
        raise TopologyError(
            f"There is no stream {config.stream!r} for the subscriber {config.durable!r}.",
            "Run `flask natspubsub setup`, or turn NATSPUBSUB_AUTO_SETUP on.",
        )
    subjects = stream["config"].get("subjects") or []
    for wanted in config.filter_subjects:
        if not any(overlaps(subject, wanted) for subject in subjects):
            raise TopologyError(
                f"The subscriber {config.durable!r} wants {wanted!r}, but the stream "
                f"{config.stream!r} stores only {', '.join(subjects)}: it would get nothing.",
                "Check topics, producer and NATSPUBSUB_ENV, or run `flask natspubsub setup` "
                "for the application that publishes them.",
            )
    return str(stream.get("created", ""))


def stream_body(config: StreamConfig) -> Json:
    """Turn a configuration into the server's JSON."""
    window = min(config.duplicate_window, config.max_age or config.duplicate_window)
    return {
        "name": config.name,
        "subjects": list(config.subjects),
        "retention": config.retention,
        "storage": config.storage,
        "discard": config.discard,
        "max_age": int(config.max_age * NANO),
        "duplicate_window": int(window * NANO),
        "max_msgs": config.max_msgs,
        "max_bytes": config.max_bytes,
        "num_replicas": config.replicas,
        "allow_direct": True,
    }


def stream_info(report: Json) -> StreamInfo:
    """Turn the server's report on a stream into ours."""
    config, state = report["config"], report["state"]
    return StreamInfo(
        config=StreamConfig(
            name=config["name"],
            subjects=tuple(config.get("subjects") or ()),
            max_age=config.get("max_age", 0) / NANO,
            duplicate_window=config.get("duplicate_window", 0) / NANO,
            max_msgs=config.get("max_msgs", -1),
            max_bytes=config.get("max_bytes", -1),
            storage=config.get("storage", "file"),
            replicas=config.get("num_replicas", 1),
            discard=config.get("discard", "old"),
            retention=config.get("retention", "limits"),
        ),
        messages=state["messages"],
        bytes=state["bytes"],
        first_sequence=state["first_seq"],
        last_sequence=state["last_seq"],
        created=report.get("created", ""),
        persist_mode=config.get("persist_mode") or "default",
        max_msgs_per_subject=config.get("max_msgs_per_subject", -1),
    )


def consumer_body(config: ConsumerConfig, after: int) -> Json:
    """Turn a consumer's configuration into the server's JSON."""
    body: Json = {
        "durable_name": config.durable,
        "name": config.durable,
        "ack_policy": "explicit",
        "replay_policy": "instant",
        "deliver_policy": config.deliver_policy,
        "ack_wait": int(config.ack_wait * NANO),
        "max_deliver": -1,
        "max_ack_pending": config.max_ack_pending,
        "filter_subjects": list(config.filter_subjects),
        "metadata": topology.owner_metadata(config),
    }
    if after:
        body |= {"deliver_policy": "by_start_sequence", "opt_start_seq": after + 1}
    return body


def consumer_info(report: Json) -> ConsumerInfo:
    """Turn the server's report on a consumer into ours."""
    config, delivered = report["config"], report.get("delivered") or {}
    single = config.get("filter_subject")
    metadata = config.get("metadata") or {}
    return ConsumerInfo(
        stream=report["stream_name"],
        durable=report["name"],
        filter_subjects=(single,) if single else tuple(config.get("filter_subjects") or ()),
        delivered=delivered.get("stream_seq", 0),
        ack_floor=(report.get("ack_floor") or {}).get("stream_seq", 0),
        created=report.get("created", ""),
        last_active=delivered.get("last_active") or "",
        metadata={k: v for k, v in metadata.items() if not k.startswith(SERVER_METADATA)},
        is_pull=not config.get("deliver_subject"),
        pending=report.get("num_pending", 0),
        ack_pending=report.get("num_ack_pending", 0),
        redelivered=report.get("num_redelivered", 0),
        waiting=report.get("num_waiting", 0),
    )


def _stored_message(stream: str, message: Json) -> StoredMessage:
    block = base64.b64decode(message.get("hdrs") or "")
    return StoredMessage(
        stream=stream,
        sequence=message["seq"],
        subject=message["subject"],
        headers=parse_headers(block) if block else {},
        data=base64.b64decode(message.get("data") or ""),
        timestamp=parse_timestamp(message["time"]).timestamp(),
    )
