"""What the consumer of a subscriber is while several versions of it run side by side. No I/O.

In a rolling deploy the old and the new processes share one consumer, and either may be the last
to start. So it grows at once to what any of them needs, and shrinks only to what nobody needs any
more. Which declaration is the newest is written on the consumer: the old process that starts
once more finds its own further back in that history, and takes nothing away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import msgspec

from ..messages.subjects import covers, overlaps
from .base import ConsumerConfig

#: The metadata of a consumer that says what it was declared to be, the newest last.
HISTORY = "natspubsub.declared"
#: That of one which catches up for another: up to which message.
UNTIL = "natspubsub.until"
#: So many declarations are remembered.
LONGEST_HISTORY = 12
#: For so many seconds nobody must need what an older declaration does not know, before a process
#: that has this older one takes it away: the deploy was rolled back then.
GRACE = 300.0
#: The same where what nobody takes is half of what may be delivered, and would hold up the rest.
CROWDED_GRACE = 15.0


class Needs(msgspec.Struct, frozen=True):
    """What a process needs of a consumer; others may need more."""

    filter_subjects: tuple[str, ...]
    ack_wait: float
    max_ack_pending: int

    @classmethod
    def of(cls, config: ConsumerConfig) -> Needs:
        """Return what a declared consumer needs."""
        return cls(config.filter_subjects, config.ack_wait, config.max_ack_pending)

    def covers(self, other: Needs) -> bool:
        """Whether ``other`` lacks nothing where the consumer is this."""
        return self.joined(other) == self

    def joined(self, other: Needs) -> Needs:
        """Return what both need, this one's filters first."""
        return Needs(
            disjoint((*self.filter_subjects, *other.filter_subjects)),
            max(self.ack_wait, other.ack_wait),
            _less_or_ordered(self.max_ack_pending, other.max_ack_pending),
        )

    def missing(self, other: Needs) -> list[str]:
        """Say what ``other`` needs that this does not give; how many at once is a mere limit."""
        found = [one for one in other.filter_subjects if not self.wants(one)]
        if self.ack_wait < other.ack_wait:
            found.append(f"ack_wait {other.ack_wait:g}")
        if other.max_ack_pending == 1 != self.max_ack_pending:
            found.append("one message at a time")
        return found

    def wants(self, subject: str) -> bool:
        """Whether a message to ``subject`` is for it."""
        return any(covers(pattern, subject) for pattern in self.filter_subjects)

    @property
    def fingerprint(self) -> str:
        """Stand for this declaration in the history."""
        ordered = self.max_ack_pending == 1  # any other number may be that of a limit
        text = f"{sorted(self.filter_subjects)} {self.ack_wait:g} {ordered}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def _less_or_ordered(one: int, other: int) -> int:
    return 1 if 1 in (one, other) else max(one, other)


def disjoint(subjects: Sequence[str]) -> tuple[str, ...]:
    """Drop subjects that others cover, and widen those that overlap in part.

    The server refuses a consumer with two filters that have a subject in common.
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
    """Return a subject that covers two that overlap."""
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
    """Return the declarations that a consumer has had, the newest last."""
    return metadata.get(HISTORY, "").split()


def is_outdated(needs: Needs, metadata: Mapping[str, str]) -> bool:
    """Whether a newer declaration than this one was seen on the consumer."""
    history = history_of(metadata)
    return needs.fingerprint in history[:-1] and history[-1] != needs.fingerprint


def with_newest(needs: Needs, had: Needs, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata with this declaration as the newest.

    :param had: what the consumer has given so far, which is the whole history of one that has
        been declared in one way only.
    """
    mark = needs.fingerprint
    history = history_of(metadata) or [had.fingerprint]
    if history[-1] == mark:
        return dict(metadata)
    history = [*(one for one in history if one != mark), mark]
    return {**metadata, HISTORY: " ".join(history[-LONGEST_HISTORY:])}
