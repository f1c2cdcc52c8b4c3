"""The oracle: compares committed messages with their effects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from .shop import SUBSCRIBER
from .site import Site

COLUMNS = ("sent", "committed", "effects", "duplicates", "lost", "max_delay_s")
HEADER = f"{'scenario':34}" + "".join(name.rjust(12) for name in COLUMNS)


@dataclass
class Result:
    """The counts of one run.

    :param sent: what was tried to be published.
    :param committed: what is in the outbox of it.
    :param effects: rows that the handler has committed.
    :param duplicates: effects beyond the first of a message.
    :param lost: committed messages without an effect.
    :param max_delay: longest time from the publish to the effect, seconds.
    :param facts: what else was counted.
    :param problems: what should not be, in words.
    """

    scenario: str
    sent: int
    committed: int
    effects: int
    duplicates: int
    lost: int
    max_delay: float
    facts: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = (self.sent, self.committed, self.effects, self.duplicates, self.lost)
        columns = "".join(f"{count:12,}" for count in counts)
        facts = ", ".join(f"{name} {value:,.6g}" for name, value in self.facts.items())
        lines = [f"{self.scenario:34}{columns}{self.max_delay:12.2f}   {facts}".rstrip()]
        return "\n".join(lines + [f"    WRONG: {problem}" for problem in self.problems])

    def expect(self, true: bool, problem: str) -> None:
        """Add a problem unless ``true`` is."""
        if not true:
            self.problems.append(problem)


def count(
    scenario: str, site: Site, sent: int | None = None, committed: Mapping[str, float] | None = None
) -> Result:
    """Compare the ledger with what was committed.

    :param committed: event ids and when they were published; default: those of the outbox.
    """
    rows = committed
    if rows is None:
        rows = dict(site.rows("SELECT event_id, created_at FROM natspubsub_outbox"))
    ids = set(rows)
    effects = site.rows(f"SELECT event_id, at FROM effect WHERE subscriber = '{SUBSCRIBER}'")
    times = Counter(event_id for event_id, _ in effects)
    delays = [at - rows[event_id] for event_id, at in effects if event_id in rows]
    result = Result(
        scenario,
        sent=len(ids) if sent is None else sent,
        committed=len(ids),
        effects=len(effects),
        duplicates=sum(times.values()) - len(times),
        lost=len(ids - set(times)),
        max_delay=max(delays, default=0.0),
    )
    result.expect(not result.lost, f"{result.lost} messages were lost")
    result.expect(not set(times) - ids, "effects of messages that were never committed")
    if site.settings["use_inbox"]:
        result.expect(not result.duplicates, f"{result.duplicates} effects happened again")
    if committed is None:
        orders = {event_id for (event_id,) in site.rows('SELECT event_id FROM "order"')}
        result.expect(orders == ids, "orders and outbox rows differ")
    return result


def count_sent(scenario: str, site: Site) -> Result:
    """Compare what is in the stream with the outbox; an effect is a message in the stream."""
    rows = site.number("SELECT count(*) FROM natspubsub_outbox")
    sent = site.number("SELECT count(DISTINCT stream_sequence) FROM natspubsub_outbox")
    delay = site.rows("SELECT max(sent_at - created_at) FROM natspubsub_outbox")[0][0]
    lost, resent = rows - sent, len(site.resent)
    copies = site.stored - sent + resent
    result = Result(scenario, rows, rows, site.stored, copies, lost, float(delay or 0))
    result.expect(not lost, f"{lost} rows were not sent")
    result.expect(not copies, f"{copies} rows were sent again")
    return result
