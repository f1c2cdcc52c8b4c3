"""The JetStream API as requests and JSON, close to the bytes.

Stream and consumer configurations are kept as the server sent them: what this package does
not know of (options of a newer server, say) survives an update. The API and its error codes
are those of the server's JetStream API reference.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import Sequence

from ...errors import TopologyError
from ...messages.ids import parse_timestamp
from ...messages.message import StoredMessage
from ...text import get_logger
from .. import topology
from ..base import Change, StreamConfig, StreamInfo
from ..wire import parse_headers
from .api import STREAM_NOT_FOUND, ApiError, Json
from .consumer_api import NANO, ConsumerApi

_log = get_logger("flask_natspubsub.broker")

STREAM_NAME_IN_USE = 10058
MESSAGE_NOT_FOUND = 10037
MAX_STREAMS = (10027, 10002)
MAX_BYTES_REQUIRED = 10113
MAX_STREAM_BYTES = (10120, 10122)
NO_STORAGE = (10023, 10028, 10047)
SETUP_LOCK_SECONDS = 10.0
#: The number of messages, of a megabyte each perhaps, that are read at once.
READ_AT_ONCE = 16
#: The max_bytes of the lock: some accounts want each stream to have a limit.
LOCK_BYTES = 1024 * 1024


class JetStreamApi(ConsumerApi):
    """Asks the server about streams, consumers and messages, and changes them."""

    # --- streams

    async def streams(self) -> list[Json]:
        """Return the raw reports on all streams."""
        return await self.pages("STREAM.LIST", "streams")

    async def setup(self, wanted: Sequence[StreamConfig], *, dry_run: bool) -> list[Change]:
        """Bring the streams up to what is wanted; see ``topology.plan``."""
        changes = topology.plan(wanted, await self._existing(wanted))
        if dry_run or not _writes(changes):
            return changes
        lock = await self._lock_setup(wanted[0].name)
        try:
            changes = topology.plan(wanted, await self._existing(wanted))
            for change in _writes(changes):
                try:
                    await self._apply(change, wanted)
                except TopologyError as error:
                    if lock is None or getattr(error.__cause__, "err_code", 0) not in MAX_STREAMS:
                        raise
                    await self._unlock_setup(lock)  # it may have had the last place
                    lock = None
                    await self._apply(change, wanted)
        finally:
            await self._unlock_setup(lock)
        return changes

    async def _unlock_setup(self, lock: str | None) -> None:
        if lock:
            await self.find(f"STREAM.DELETE.{lock}", None, [STREAM_NOT_FOUND])

    async def _existing(self, wanted: Sequence[StreamConfig]) -> list[StreamInfo]:
        """Return the named streams; all streams only if one of the named has to change."""
        named = await asyncio.gather(*(self.stream(stream.name) for stream in wanted))
        infos = [stream_info(report) for report in named if report]
        complete = len(infos) == len(wanted) and not _writes(topology.plan(wanted, infos))
        return infos if complete else [stream_info(report) for report in await self.streams()]

    async def _apply(self, change: Change, wanted: Sequence[StreamConfig]) -> None:
        assert change.config is not None
        if change.action == "create":
            await self._make_stream(change.config, wanted)
            return
        report = await self.stream(change.stream)
        if report is not None:
            body = report["config"] | {"subjects": list(change.config.subjects)}
            await self.call(f"STREAM.UPDATE.{change.stream}", body)

    async def _make_stream(self, config: StreamConfig, wanted: Sequence[StreamConfig]) -> None:
        """Create a stream within the limits of the account and the server, as far as may be."""
        body = stream_body(config)
        try:
            await self.call(f"STREAM.CREATE.{config.name}", body)
            return
        except ApiError as error:
            body, changed = _within_limits(body, error, wanted)
            if not changed:
                raise _explained(config, error) from error
        report = await self.call(f"STREAM.CREATE.{config.name}", body)
        made = stream_info(report).config
        _log.warning(
            "the stream %r was made with %s %g: %s",
            config.name, changed, getattr(made, changed), _WHY[changed],
        )  # fmt: skip

    async def _lock_setup(self, stream: str) -> str | None:
        """Take turns with other processes: two that add subjects at once would undo each other.

        The server has no compare-and-set for streams, but creating one is atomic: the lock is
        a small stream in memory whose description names its owner. One left behind by a crash
        is removed after some seconds. Without the permission to do this there is no lock.
        """
        name = f"{stream}-setup"
        body = stream_body(
            StreamConfig(
                name=name,
                subjects=(f"_natspubsub.setup.{stream}",),
                storage="memory",
                max_bytes=LOCK_BYTES,
            )
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


#: Why a stream was made otherwise than it was asked for.
_WHY = {
    "duplicate_window": "the server allows no longer one. Set duplicate_window in "
    "NATSPUBSUB_STREAM_CONFIG to what it is",
    "max_bytes": "the account wants a limit. It is that of the main stream; set max_bytes in "
    "NATSPUBSUB_DLQ_STREAM_CONFIG to have another",
}


def _within_limits(body: Json, error: ApiError, wanted: Sequence[StreamConfig]) -> tuple[Json, str]:
    """Return what the server may take instead, and the setting that was changed, if any."""
    if "duplicates window" in error.description:  # without one, the server takes its longest
        return {k: v for k, v in body.items() if k != "duplicate_window"}, "duplicate_window"
    main = wanted[0].max_bytes
    if error.err_code == MAX_BYTES_REQUIRED and main > 0 and body["name"] != wanted[0].name:
        return body | {"max_bytes": main}, "max_bytes"
    return body, ""


def _explained(config: StreamConfig, error: ApiError) -> Exception:
    """Name the limit, and the setting that keeps to it."""
    what = f"The stream {config.name!r} could not be made: {error.description}."
    dlq = config.name.endswith("-dlq")
    key = "NATSPUBSUB_DLQ_STREAM_CONFIG" if dlq else "NATSPUBSUB_STREAM_CONFIG"
    if error.err_code == MAX_BYTES_REQUIRED:
        return TopologyError(what, f"Set max_bytes in {key}: the account wants it.")
    if error.err_code in MAX_STREAM_BYTES:
        return TopologyError(what, f"Set a smaller max_bytes in {key}, or raise that limit.")
    if error.err_code in NO_STORAGE:
        return TopologyError(
            what, f"Set a smaller max_bytes in {key}, or raise the storage of the account."
        )
    if error.err_code in MAX_STREAMS:
        return TopologyError(
            what, "Raise max_streams of the account, or delete a stream that nobody uses."
        )
    return error


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
        origins=tuple(
            origin["name"]
            for origin in (config.get("mirror"), *(config.get("sources") or ()))
            if origin
        ),
        is_mirror=bool(config.get("mirror")),
    )


def _stored_message(stream: str, message: Json) -> StoredMessage:
    block = base64.b64decode(message.get("hdrs") or "")
    return StoredMessage(
        stream=stream,
        sequence=message["seq"],
        subject=message["subject"],
        headers=parse_headers(block),
        data=base64.b64decode(message.get("data") or ""),
        timestamp=parse_timestamp(message["time"]).timestamp(),
    )
