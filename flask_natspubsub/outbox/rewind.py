"""Detects that a stream was rewound, and sends its lost messages again.

A stream is rewound when it has lost messages that it had acknowledged. Four things show it: the
stream was created anew; its last sequence is lower than one seen before; a new message gets a
sequence that was given already; or the message at a sequence is not the one that was
acknowledged there, because others have filled the gap.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..brokers.base import Broker, StoredAck, StreamInfo
from ..brokers.storing import is_known_as
from ..text import get_logger
from .store import OutboxStore
from .streams import StreamRecord
from .verification import lost_rows

_log = get_logger("flask_natspubsub.relay")

#: How many of the rows sent last are read for the highest sequence, after a restart.
NEWEST = 2000


class _Seen(NamedTuple):
    """The highest sequence acknowledged, and its event id; empty if another app's event has it."""

    sequence: int = 0
    event_id: str = ""


_NOTHING = _Seen()


class StreamWatch:
    """What one relay knows of the streams that it publishes to; for one thread."""

    def __init__(self, store: OutboxStore, broker: Broker) -> None:
        #: Whether a stream has lost messages that were not sent again yet.
        self.rewound = False
        #: Whether rows were sent to a stream that was never checked.
        self.has_new = False
        self._store = store
        self._broker = broker
        self._seen: dict[str, _Seen] = {}
        self._rewinds: dict[str, int] = {}
        self._suspected: dict[str, str] = {}
        self._records: dict[str, StreamRecord] | None = None
        self._doubted: set[str] = set()
        self._walk: Iterator[list[int]] | None = None
        self._walked: StreamRecord | None = None
        self._lost: list[int] = []

    def load(self) -> None:
        """Read the sequences that other relays, or this one before a restart, have seen."""
        highest = self._store.sent.highest(NEWEST)
        self._seen = {row.stream: _Seen(row.sequence, row.event_id) for row in highest}
        self._records = records = self._store.streams.load()
        self._rewinds = {record.name: record.rewinds for record in records.values()}
        self.rewound = any(record.rewound_at is not None for record in records.values())
        for record in records.values():
            if record.rewound_at is not None:  # rows of before the loss have higher numbers
                self._seen[record.name] = _Seen(record.last_sequence)

    def note(self, stored: Sequence[tuple[str, StoredAck]]) -> None:
        """Remember acknowledgements by their event ids, in the order of publishing.

        Only compares; ``report`` writes what it finds where other processes see it.
        """
        newest: dict[str, tuple[int, str]] = {}
        for event_id, ack in stored:
            stream, sequence = ack.stream, ack.sequence
            newest[stream] = max(newest.get(stream, _NOTHING), (sequence, event_id))
            seen = self._seen.get(stream, _NOTHING).sequence
            if sequence <= seen and not ack.duplicate:
                self._suspected.setdefault(
                    stream, f"a new message is number {sequence}, and {seen} had been given"
                )
        self.has_new = self.has_new or not newest.keys() <= self._rewinds.keys()
        for stream, found in newest.items():
            self._seen[stream] = max(self._seen.get(stream, _NOTHING), _Seen(*found))

    def report(self) -> None:
        """Report the streams that ``note`` suspects.

        :raises NatsPubsubError: the database or the server failed; to be called again.
        """
        if self._suspected:
            records = self._store.streams.load()
            for name, reason in list(self._suspected.items()):
                self._report_one(name, reason, records.get(name), self._broker.stream_info(name))
                self._suspected.pop(name, None)

    def check(self) -> None:
        """Check all streams that rows were sent to.

        :raises NatsPubsubError: the database or the server failed.
        """
        self.has_new = False
        self.report()
        # What was read a moment ago is not read again.
        loaded, self._records = self._records, None
        records = self._store.streams.load() if loaded is None else loaded
        self.rewound = any(record.rewound_at is not None for record in records.values())
        for name in sorted(records.keys() | self._seen.keys()):
            began = time.monotonic()
            self._catch_up(records.get(name))
            info = self._broker.stream_info(name)
            reason = self._verdict(name, records.get(name), info)
            if reason and self._is_sure(info, name):
                self._report_one(name, reason, records.get(name), info)
            elif info is not None and not reason:
                self._doubted.discard(name)
                self._store.streams.confirm(info, time.monotonic() - began)
                self._rewinds.setdefault(name, 0)

    def _is_sure(self, info: StreamInfo | None, name: str) -> bool:
        """Whether to believe it: a new leader of replicas may need a moment to load its state."""
        if info is None or info.config.replicas == 1 or name in self._doubted:
            return True
        self._doubted.add(name)
        return False

    def _catch_up(self, record: StreamRecord | None) -> None:
        """Adopt a rewind that another relay has reported: sequences seen before it are void."""
        if record is not None and self._rewinds.get(record.name, record.rewinds) != record.rewinds:
            self._seen[record.name] = _Seen(record.last_sequence)
        if record is not None:
            self._rewinds[record.name] = record.rewinds

    def _verdict(self, name: str, record: StreamRecord | None, info: StreamInfo | None) -> str:
        """Return what shows that the stream was rewound; empty if nothing does."""
        if info is None:
            return "it is gone" if record is None or record.created else ""
        if record is not None and record.created not in ("", info.created):
            return f"it was created anew, {info.created}"
        seen = self._seen.get(name, _Seen())
        highest = max(seen.sequence, record.last_sequence if record else 0)
        if info.last_sequence < highest:
            return f"its last message is number {info.last_sequence}, and {highest} had been given"
        if not seen.event_id or seen.sequence < info.first_sequence:
            return ""
        message = self._broker.get_message(name, seen.sequence)
        if message is None or is_known_as(message.headers, seen.event_id):
            return ""
        return f"its message number {seen.sequence} is not the one that was acknowledged"

    def _report_one(
        self, name: str, reason: str, record: StreamRecord | None, info: StreamInfo | None
    ) -> None:
        known = self._rewinds.get(name, 0)
        if self._store.streams.report(name, reason, info, known):
            self._rewinds[name] = known + 1
            _log.error(
                "the stream %r has lost messages that it had acknowledged: %s. 'flask natspubsub "
                "outbox resend --missing-only' sends them again; see 'outbox verify'",
                name,
                reason,
            )
        elif record is not None:
            self._rewinds[name] = record.rewinds
        self._seen[name] = _Seen(info.last_sequence if info else 0)
        self._walk = None
        self.rewound = True

    # --- repair

    def resend_some(self) -> bool:
        """Continue the search for lost messages; at its end, make their rows pending.

        :returns: whether to call it again.
        :raises NatsPubsubError: the database or the server failed; the search begins anew.
        """
        if self._walk is None or self._walked is None:
            records = [one for one in self._store.streams.rewound() if one.created]
            if not records:
                return False
            self._walked, self._lost = records[0], []
            self._walk = lost_rows(self._store, self._broker, self._walked)
        walk, self._walk = self._walk, None  # one that fails cannot be continued
        lost = next(walk, None)
        if lost is None:
            self._end_of_walk(self._walked)
            return True
        self._lost += lost
        self._walk = walk
        return True

    def _end_of_walk(self, record: StreamRecord) -> None:
        # Only now, and the oldest first: found newest first, one could overtake another of its key.
        count = self._store.sent.resend(sorted(self._lost))
        if self._store.streams.clear(record):
            _log.warning("the stream %r: %d lost rows are sent again", record.name, count)
        self.rewound = bool(self._store.streams.rewound())
