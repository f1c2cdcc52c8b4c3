"""Checks of plain facts, and a grade of durability. No I/O: ``gathering`` does it.

The grade says how safe messages are once the application's stream has acknowledged them:

====  ==========================================================================
A     replicas, each of which writes to its disk before it acknowledges
B     one server that writes before it acknowledges, or replicas that do not
C     one server with default settings: a loss of power may take two minutes
D     less than that: memory, unwritten acknowledgements, an old server, no stream,
      or a loss that was noticed and is not repaired
====  ==========================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import msgspec

from ..config.parsers import DAY
from ..inspection import is_stuck
from .facts import Facts, StreamFacts

Grade = Literal["A", "B", "C", "D"]
Severity = Literal["error", "warning", "info"]

GRADES: tuple[Grade, ...] = ("A", "B", "C", "D")
OLDEST = (2, 10, 23)
#: The patch releases that fix CVE-2025-30215, by major and minor version.
PATCHED = {(2, 10): 27, (2, 11): 1}
#: The default ``sync_interval`` of nats-server, in seconds.
DEFAULT_SYNC_INTERVAL = 120.0


class Finding(msgspec.Struct, frozen=True):
    """The result of a check.

    :param code: a stable name.
    :param what: the problem in one sentence.
    :param fix: the remedy; empty if there is none.
    """

    code: str
    severity: Severity
    what: str
    fix: str = ""


class Diagnosis(msgspec.Struct, frozen=True):
    """The grade and the findings, the worst first."""

    grade: Grade
    findings: tuple[Finding, ...]

    @property
    def has_errors(self) -> bool:
        """Whether something does not work, or may lose messages."""
        return any(finding.severity == "error" for finding in self.findings)

    def is_under(self, grade: Grade) -> bool:
        """Whether the grade is worse than ``grade``."""
        return GRADES.index(self.grade) > GRADES.index(grade)


def examine(facts: Facts) -> Diagnosis:
    """Check everything; no I/O."""
    found = [finding for check in CHECKS for finding in check(facts)]
    order: Sequence[Severity] = ("error", "warning", "info")
    return Diagnosis(grade(facts), tuple(sorted(found, key=lambda one: order.index(one.severity))))


def grade(facts: Facts) -> Grade:
    """Return the grade of the stream; see the table at the top."""
    main = [stream for stream in facts.streams if stream.is_main and stream.exists]
    lost = facts.outbox is not None and facts.outbox.rewound
    if not main or lost or any(_is_volatile(stream) for stream in main) or _is_old(facts):
        return "D"
    always = facts.server.sync_always is True
    replicated = all(stream.replicas >= 3 for stream in main)
    if always and replicated:
        return "A"
    return "B" if always or replicated else "C"


def version_of(text: str) -> tuple[int, ...]:
    """Return the three numbers of ``2.10.23``; empty if there are not three."""
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else ()


def _is_volatile(stream: StreamFacts) -> bool:
    return stream.storage == "memory" or stream.persist_mode == "async"


def _is_old(facts: Facts) -> bool:
    version = version_of(facts.server.version)
    return bool(version) and version < OLDEST


# --- the server


def _check_version(facts: Facts) -> Iterator[Finding]:
    text, version = facts.server.version, version_of(facts.server.version)
    if _is_old(facts):
        yield Finding(
            "server-old", "error", f"nats-server {text} may lose a stream when it is killed.",
            "Use 2.10.23 or newer, better the latest 2.12 or 2.14.",
        )  # fmt: skip
    elif version and version[2] < PATCHED.get((version[0], version[1]), 0):
        yield Finding(
            "server-cve", "warning",
            f"nats-server {text} lets one account manage the streams of others (CVE-2025-30215).",
            "Use 2.10.27, 2.11.1 or newer.",
        )  # fmt: skip


def _check_monitor(facts: Facts) -> Iterator[Finding]:
    server = facts.server
    if server.monitor_problem:
        yield Finding(
            "monitor", "warning", f"The monitoring address did not help: {server.monitor_problem}.",
            "Check --monitor-url, and http_port in the server's configuration.",
        )  # fmt: skip
    elif server.sync_always is None:
        yield Finding(
            "sync-unknown", "info",
            "How often the server writes to its disk is not known; the grade takes the default, "
            "every two minutes.",
            "Give --monitor-url or set NATSPUBSUB_MONITOR_URL.",
        )  # fmt: skip


def _check_sync(facts: Facts) -> Iterator[Finding]:
    alone = any(stream.is_main and stream.replicas == 1 for stream in facts.streams)
    if alone and not facts.server.sync_always:
        interval = facts.server.sync_interval or DEFAULT_SYNC_INTERVAL
        yield Finding(
            "sync-interval", "warning",
            f"A loss of power may take the last {interval:,.0f} s of acknowledged messages.",
            "Set sync_interval: always in the server's jetstream block, or use three replicas.",
        )  # fmt: skip


# --- the streams


def _check_streams(facts: Facts) -> Iterator[Finding]:
    for stream in facts.streams:
        if not stream.exists:
            yield Finding(
                "stream-missing", "error", f"There is no stream {stream.name!r}.",
                "Run `flask natspubsub setup`, or start a worker.",
            )  # fmt: skip
        else:
            yield from _check_volatile(stream, facts)
            if stream.is_main:
                yield from _check_limits(stream, facts)


def _check_volatile(stream: StreamFacts, facts: Facts) -> Iterator[Finding]:
    tolerated = facts.allow_volatile or facts.outbox is None
    severity: Severity = "warning" if tolerated else "error"
    if stream.storage == "memory":
        yield Finding(
            "memory-storage", severity,
            f"The stream {stream.name!r} keeps messages in memory: a restart loses them.",
            "Make it anew with file storage, or set NATSPUBSUB_ALLOW_VOLATILE_STREAMS.",
        )  # fmt: skip
    if stream.persist_mode == "async":
        yield Finding(
            "persist-async", severity,
            f"The stream {stream.name!r} acknowledges messages before they are written, also "
            "with sync_interval: always.",
            "Make it anew with persist_mode default, or set NATSPUBSUB_ALLOW_VOLATILE_STREAMS.",
        )  # fmt: skip


def _check_limits(stream: StreamFacts, facts: Facts) -> Iterator[Finding]:
    size = facts.server.cluster_size or 1
    if stream.replicas < 3 <= size:
        yield Finding(
            "replicas", "warning",
            f"The stream {stream.name!r} has {stream.replicas} replica(s) in a cluster of {size}.",
            "Give it three: nats stream edit --replicas 3, and replicas in "
            "NATSPUBSUB_STREAM_CONFIG.",
        )  # fmt: skip
    if stream.retention != "limits":
        yield Finding(
            "retention", "warning",
            f"The stream {stream.name!r} has retention {stream.retention!r}: what was consumed "
            "cannot be verified or replayed.",
            "Make it anew with retention limits.",
        )  # fmt: skip
    if facts.outbox is not None and stream.discard == "old":
        yield Finding(
            "discard-old", "info",
            f"The stream {stream.name!r} drops the oldest messages when it is full.",
            "With discard 'new' the outbox keeps what finds no room, and sends it later.",
        )  # fmt: skip
    if stream.duplicate_window < 2 * 60:
        yield Finding(
            "duplicate-window", "warning",
            f"The stream {stream.name!r} knows a second copy for {stream.duplicate_window:g} s "
            "only; a relay may send again later than that.",
            "Set duplicate_window to 120 or more, and use the inbox.",
        )  # fmt: skip


def _check_drift(facts: Facts) -> Iterator[Finding]:
    if facts.setup_problem:
        yield Finding("setup", "error", facts.setup_problem)
    for action, stream, detail in facts.setup:
        if action == "add_subjects":
            yield Finding(
                "subjects-missing", "error",
                f"The stream {stream!r} does not store {detail}.", "Run `flask natspubsub setup`.",
            )  # fmt: skip
        elif action == "differs":
            yield Finding(
                "stream-differs", "warning",
                f"The stream {stream!r} is not as configured: {detail}.",
                "Change the stream or NATSPUBSUB_STREAM_CONFIG.",
            )  # fmt: skip
    for subject in facts.unbound:
        yield Finding(
            "subject-unbound", "error", f"No stream stores {subject!r}.",
            "Run `flask natspubsub setup`, or check NATSPUBSUB_ENV and the subscriber's subject.",
        )  # fmt: skip


# --- subscribers and rows


def _check_consumers(facts: Facts) -> Iterator[Finding]:
    for one in facts.consumers:
        if not one.exists:
            yield Finding(
                "consumer-missing", "info",
                f"The subscriber {one.name!r} has no consumer yet.", "A worker makes it.",
            )  # fmt: skip
        if one.missing_subjects:
            yield Finding(
                "consumer-differs", "warning",
                f"The consumer of {one.name!r} does not get {', '.join(one.missing_subjects)}.",
                "A worker that runs this code changes it back within seconds: look at its log.",
            )  # fmt: skip
        if one.extra_subjects:
            yield Finding(
                "consumer-shared", "info",
                f"The consumer of {one.name!r} also gets {', '.join(one.extra_subjects)}, which "
                "another version of the application subscribes to, or did.",
                "A worker that runs the newest code takes that away once nobody needs it.",
            )  # fmt: skip
        if one.ack_wait < 3:
            yield Finding(
                "ack-wait", "warning",
                f"The subscriber {one.name!r} has ack_wait {one.ack_wait:g} s: a short pause of "
                "the process lets its messages be delivered twice.",
                "Set ack_wait to 10 or more.",
            )  # fmt: skip
        if facts.outbox is not None and not one.inbox:
            yield Finding(
                "no-inbox", "info",
                f"The subscriber {one.name!r} has no inbox: what is sent again is handled again.",
                "Set inbox=True or NATSPUBSUB_USE_INBOX, unless it does not matter.",
            )  # fmt: skip


def _check_orphans(facts: Facts) -> Iterator[Finding]:
    for one in facts.orphans:
        kept = f", and the stream keeps {one.waiting:,} messages for it" if one.retains else ""
        unsure = "" if one.is_certain else " (unless it is another app's)"
        since = f"last used {one.last_active}" if one.last_active else "never used"
        delete = f"nats consumer rm {one.stream} {one.durable}"
        if one.is_main:
            delete = f"flask natspubsub subscribers delete {one.subscriber}"
        yield Finding(
            "consumer-orphaned", "warning" if one.is_certain else "info",
            f"The consumer {one.durable!r} on {one.stream!r} has no subscriber in this code any "
            f"more{unsure} and no worker; it was made {one.created}, {since}{kept}.",
            f"If it is gone: {delete}. If it was renamed: flask natspubsub subscribers rename "
            f"{one.subscriber} NEW.",
        )  # fmt: skip


def _check_retention(facts: Facts) -> Iterator[Finding]:
    outbox = facts.outbox
    if outbox is None:
        yield Finding(
            "no-outbox", "info",
            "There is no outbox: what a stream loses after it has acknowledged it is gone.",
            "See NATSPUBSUB_USE_OUTBOX.",
        )  # fmt: skip
        return
    interval = facts.server.sync_interval or DEFAULT_SYNC_INTERVAL
    least = max(DAY, 10 * interval)
    if outbox.retention < least:
        yield Finding(
            "outbox-retention", "warning",
            f"Sent rows are kept {outbox.retention / 3600:g} h: a loss noticed later cannot be "
            "repaired.",
            f"Set NATSPUBSUB_OUTBOX_RETENTION to {least / 3600:g} h or more.",
        )  # fmt: skip
    if outbox.inbox_retention <= outbox.retention:
        yield Finding(
            "inbox-retention", "warning",
            "The inbox forgets events that the outbox may still send again.",
            "Set NATSPUBSUB_INBOX_RETENTION longer than NATSPUBSUB_OUTBOX_RETENTION.",
        )  # fmt: skip
    for stream in facts.streams:
        longest = stream.max_age or float("inf")
        if stream.is_main and stream.exists and outbox.inbox_retention < longest:
            yield Finding(
                "inbox-stream", "info",
                f"The inbox forgets sooner than the stream {stream.name!r}: a consumer that is "
                "made anew may handle old messages again.",
                "Set NATSPUBSUB_INBOX_RETENTION to the stream's max_age or more.",
            )  # fmt: skip


def _check_rows(facts: Facts) -> Iterator[Finding]:
    outbox = facts.outbox
    if outbox is None:
        return
    for stream, reason in outbox.rewound:
        yield Finding(
            "rewound", "error",
            f"The stream {stream!r} has lost messages that it had acknowledged: {reason}.",
            "Run `flask natspubsub outbox resend --missing-only`.",
        )  # fmt: skip
    if outbox.parked:
        yield Finding(
            "parked", "error", f"{outbox.parked} rows of the outbox are parked.",
            "See `flask natspubsub outbox list --status parked`, then `outbox retry`.",
        )  # fmt: skip
    if is_stuck(outbox.oldest_pending):
        yield Finding(
            "stuck", "error",
            f"A row has been due for {outbox.oldest_pending:,.0f} s; {outbox.pending} are pending.",
            "Look at the relay's log; a server that answers nothing looks like this too.",
        )  # fmt: skip
    if not outbox.savepoints:
        yield Finding(
            "sqlite-savepoints", "warning",
            "Python's SQLite driver commits at the release of a savepoint: what was done in one, "
            "rows and events, stays when its transaction is rolled back.",
            "Begin the transaction before it; see 'SQLite' on the page about the outbox.",
        )  # fmt: skip
    if not outbox.has_relay:
        yield Finding(
            "no-relay", "warning", "No relay runs: nothing sends the outbox.",
            "Start `flask natspubsub worker` or `flask natspubsub relay`.",
        )  # fmt: skip


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _check_version,
    _check_monitor,
    _check_sync,
    _check_streams,
    _check_drift,
    _check_consumers,
    _check_orphans,
    _check_retention,
    _check_rows,
)
