"""The consumer of a subscriber while several versions of the application run. No I/O.

In a rolling deploy the old and the new processes share one consumer, and either may start last.
Therefore the consumer gets at once what any of them needs, and loses only what none needs any
more. Its metadata has the history of declarations: an old process that starts again finds that
its own declaration is not the newest, and removes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import msgspec

from ..messages.subjects import covers, overlaps
from .base import ConsumerConfig

#: Metadata key for the declarations of a consumer, the newest last.
HISTORY = "natspubsub.declared"
#: Metadata key of a consumer that catches up for another: the last message.
UNTIL = "natspubsub.until"
#: Maximum number of declarations in the history.
MAX_HISTORY = 12
#: Seconds after which a process with an older declaration removes what only newer ones need,
#: if no process needs it: the deploy was rolled back.
GRACE = 300.0
#: The same, if unwanted messages are half of those in delivery and would hold up the rest.
CROWDED_GRACE = 15.0


class Needs(msgspec.Struct, frozen=True):
    """The options of a consumer that a process needs; other processes may need more."""

    filter_subjects: tuple[str, ...]
    ack_wait: float
    max_ack_pending: int

    @classmethod
    def of(cls, config: ConsumerConfig) -> Needs:
        """Return the needs of a declared consumer."""
        return cls(config.filter_subjects, config.ack_wait, config.max_ack_pending)

    def covers(self, other: Needs) -> bool:
        """Whether a consumer with these options gives ``other`` everything it needs."""
        return self.joined(other) == self

    def joined(self, other: Needs) -> Needs:
        """Return the options that satisfy both, with this one's filters first."""
        return Needs(
            disjoint((*self.filter_subjects, *other.filter_subjects)),
            max(self.ack_wait, other.ack_wait),
            _less_or_ordered(self.max_ack_pending, other.max_ack_pending),
        )

    def missing(self, other: Needs) -> list[str]:
        """List what ``other`` needs and this does not give; ``max_ack_pending`` is only a limit."""
        found = [one for one in other.filter_subjects if not self.wants(one)]
        if self.ack_wait < other.ack_wait:
            found.append(f"ack_wait {other.ack_wait:g}")
        if other.max_ack_pending == 1 != self.max_ack_pending:
            found.append("one message at a time")
        return found

    def wants(self, subject: str) -> bool:
        """Whether the process subscribes to ``subject``."""
        return any(covers(pattern, subject) for pattern in self.filter_subjects)

    @property
    def fingerprint(self) -> str:
        """The hash that identifies this declaration in the history."""
        ordered = self.max_ack_pending == 1  # any other number may be a server's limit
        text = f"{sorted(self.filter_subjects)} {self.ack_wait:g} {ordered}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def _less_or_ordered(one: int, other: int) -> int:
    return 1 if 1 in (one, other) else max(one, other)


def disjoint(subjects: Sequence[str]) -> tuple[str, ...]:
    """Return ``subjects`` without overlaps: remove covered ones and merge overlapping ones.

    The server refuses a consumer with two filters that overlap.
    """
    kept: list[str] = []
    for subject in subjects:
        if any(covers(one, subject) for one in kept):
            continue
        for one in [one for one in kept if overlaps(one, subject)]:
            kept.remove(one)
            subject = _both(one, subject)
        kept = [one for one in kept if not covers(subject, one)]
        kept.append(subject)
    return tuple(kept) if len(kept) < 2 or not _overlap(kept) else disjoint(kept)


def _overlap(subjects: Sequence[str]) -> bool:
    return any(
        overlaps(one, other) for at, one in enumerate(subjects) for other in subjects[at + 1 :]
    )


def _both(one: str, other: str) -> str:
    """Return a subject that covers two overlapping subjects."""
    if covers(one, other):
        return one
    if covers(other, one):
        return other
    mine, theirs = one.split("."), other.split(".")
    tokens: list[str] = []
    for a, b in zip(mine, theirs, strict=False):
        if ">" in (a, b):
            return ".".join((*tokens, ">"))
        tokens.append(a if a == b else "*")
    return ".".join(tokens)


def history_of(metadata: Mapping[str, str]) -> list[str]:
    """Return the history of a consumer's declarations, the newest last."""
    return metadata.get(HISTORY, "").split()


def is_outdated(needs: Needs, metadata: Mapping[str, str]) -> bool:
    """Whether the consumer has had a newer declaration than this one."""
    history = history_of(metadata)
    return needs.fingerprint in history[:-1] and history[-1] != needs.fingerprint


def with_newest(needs: Needs, had: Needs, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata with this declaration as the newest.

    :param had: the consumer's present options. They are the first entry if the consumer has no
        history, because it was always declared in the same way.
    """
    mark = needs.fingerprint
    history = history_of(metadata) or [had.fingerprint]
    if history[-1] == mark:
        return dict(metadata)
    history = [*(one for one in history if one != mark), mark]
    return {**metadata, HISTORY: " ".join(history[-MAX_HISTORY:])}
