"""Checks that streams still have the messages they acknowledged, and resends lost ones.

A sent row has the stream and sequence of its message. The message there must have the row's
event id, unless it was older than the stream's limits, in which case it is not lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..brokers.base import Broker, StreamInfo
from ..brokers.storing import is_known_as
from ..messages.ids import parse_timestamp
from ..text import get_logger

if TYPE_CHECKING:
    from .sent import SentRow
    from .store import OutboxStore
    from .streams import StreamRecord

_log = get_logger("flask_natspubsub.relay")

State = Literal["present", "missing", "expired"]

#: One of this number of older rows is checked, unless ``full`` is set.
SAMPLE = 100
#: The number of newest rows that are always checked, because a power loss affects the end.
NEWEST = 1000
#: The search for lost rows ends after this number of consecutive present rows from before the
#: rewind, because older messages are present too.
ENOUGH = 1000


def _nothing(count: int) -> None: ...


@dataclass(slots=True)
class Verification:
    """The result of comparing the outbox with the streams.

    :param rows: the number of sent rows in the requested time.
    :param checked: the number of rows that were compared.
    :param present: the number of rows whose message is in the stream.
    :param expired: the number of rows whose message was older than the stream's limits.
    :param missing: the event ids of messages that are lost.
    :param rewound: the names of rewound streams that are not repaired.
    """

    rows: int = 0
    checked: int = 0
    present: int = 0
    expired: int = 0
    missing: list[str] = field(default_factory=list)
    rewound: list[str] = field(default_factory=list)


class Locator:
    """Finds the messages of rows in their streams; call ``refresh`` after reading rows."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._infos: dict[str, StreamInfo | None] = {}

    def refresh(self) -> None:
        """Forget cached stream infos, which must not be older than the rows."""
        self._infos.clear()

    def find(self, row: SentRow) -> State:
        """Return whether the message of a row is present, missing or expired.

        :raises BrokerError: the server did not answer.
        :raises NotConnected: there is no server.
        """
        info = self._info(row.stream)
        if info is None or row.sequence > info.last_sequence:
            return "missing"
        if row.sequence < info.first_sequence:
            return "missing" if self._is_of_another(row, info) else "expired"
        message = self._broker.get_message(row.stream, row.sequence)
        if message is not None:
            found = is_known_as(message.headers, row.event_id)
            return "present" if found else self._unless_old(row, info)
        if info.config.retention != "limits" or info.max_msgs_per_subject > 0:
            return "expired"  # consumed, or replaced by a newer message of its subject
        self._infos.pop(row.stream)
        now = self._info(row.stream)
        if now is not None and row.sequence < now.first_sequence:
            return "expired"
        return self._unless_old(row, info)

    def _info(self, stream: str) -> StreamInfo | None:
        if stream not in self._infos:
            self._infos[stream] = self._broker.stream_info(stream)
        return self._infos[stream]

    def _is_of_another(self, row: SentRow, info: StreamInfo) -> bool:
        """Whether the row was sent to an earlier stream of this name, and is not too old."""
        created = parse_timestamp(info.created).timestamp() if info.created else 0.0
        return row.sent_at < created and self._unless_old(row, info) == "missing"

    def _unless_old(self, row: SentRow, info: StreamInfo) -> State:
        max_age = info.config.max_age
        old = max_age and row.sent_at + max_age < self._broker.now()
        return "expired" if old else "missing"


def lost_rows(store: OutboxStore, broker: Broker, record: StreamRecord) -> Iterator[list[int]]:
    """Yield pages of ids of the rows whose messages a rewound stream has lost.

    A rewound stream has lost its newest messages, so the search goes back from the newest row
    until ``ENOUGH`` consecutive rows are present that were sent before the rewind.
    """
    locator, met = Locator(broker), 0
    sound_until = record.sound_until or 0.0
    for page in store.sent.pages(stream=record.name):
        locator.refresh()
        missing: list[int] = []
        for row in page:
            if locator.find(row) == "missing":
                missing.append(row.id)
                met = 0
            elif row.sent_at < sound_until:
                met += 1
        yield missing
        if met >= ENOUGH:
            return


class SentEvents:
    """The durable copies of sent events: compares them with the streams, and resends them.

    Sent rows are kept ``NATSPUBSUB_OUTBOX_RETENTION`` seconds; older ones cannot be checked.
    """

    def __init__(self, store: OutboxStore, broker: Broker) -> None:
        self._store = store
        self._broker = broker

    def count(self, since: float | None = None) -> int:
        """Return the number of sent rows.

        :param since: only rows sent at or after this time, seconds since the epoch; default: all.
        """
        return self._store.sent.count(since)

    def verify(
        self,
        since: float | None = None,
        *,
        full: bool = False,
        progress: Callable[[int], None] = _nothing,
    ) -> Verification:
        """Fetch messages by their sequence and compare the event ids.

        The newest thousand rows and one in a hundred of the others are checked. If a full check
        of all rows finds nothing missing, it also ends the alarm of a rewound stream.

        :param since: only rows sent at or after this time, seconds since the epoch; default: all.
        :param full: check every row.
        :param progress: is called with the number of rows read since its last call.
        :raises BrokerError: the server did not answer.
        :raises NotConnected: there is no server.
        """
        known = self._store.streams.rewound()
        result = Verification(rows=self.count(since))
        seen = 0
        for page in self._store.sent.pages(since=since):
            wanted = page if full or seen < NEWEST else [r for r in page if r.id % SAMPLE == 0]
            seen += len(page)
            found = self._compare(wanted, result)
            self._store.sent.confirm([row.id for row, state in found if state == "present"])
            progress(len(page))
        if full and since is None and not result.missing:
            self._clear(known)
        result.rewound = [record.name for record in self._store.streams.rewound()]
        return result

    def _compare(self, page: list[SentRow], result: Verification) -> list[tuple[SentRow, State]]:
        locator = Locator(self._broker)
        found = [(row, locator.find(row)) for row in page]
        states = [state for _, state in found]
        result.checked += len(page)
        result.present += states.count("present")
        result.expired += states.count("expired")
        result.missing += [row.event_id for row, state in found if state == "missing"]
        return found

    def resend(
        self,
        since: float | None = None,
        *,
        missing_only: bool = False,
        dry_run: bool = False,
        progress: Callable[[int], None] = _nothing,
    ) -> int:
        """Make sent rows pending again, with the same event ids; a relay then sends them.

        After its duplicate window, a stream stores a second copy of a message that it still has;
        the inbox skips the second copy. This ends the alarm of a rewound stream, unless messages
        sent before ``since`` are missing too.

        :param since: only rows sent at or after this time, seconds since the epoch; default: all.
        :param missing_only: only rows whose message is missing in the stream.
        :param dry_run: change nothing.
        :param progress: is called with the number of rows read since its last call.
        :returns: the number of rows that were, or would be, made pending.
        """
        chosen: list[int] = []
        known = self._store.streams.rewound()
        for page in self._store.sent.pages(since=since):
            chosen += self._lost(page) if missing_only else [row.id for row in page]
            progress(len(page))
        if dry_run:
            return len(chosen)
        count = self._store.sent.resend(sorted(chosen))  # in the order of their ids
        self._clear([record for record in known if self._is_whole(record)])
        return count

    def _lost(self, page: list[SentRow]) -> list[int]:
        locator = Locator(self._broker)
        return [row.id for row in page if locator.find(row) == "missing"]

    def _is_whole(self, record: StreamRecord) -> bool:
        return not any(lost_rows(self._store, self._broker, record))

    def _clear(self, records: list[StreamRecord]) -> None:
        for record in records:
            if self._store.streams.clear(record):
                _log.info("the stream %r is no longer reported as rewound", record.name)
