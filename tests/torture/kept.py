"""Keeps results of long runs, so that ``make torture`` resumes, and reports them."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.support.databases import postgres_version
from tests.support.servers import nats_server_binary

from .ledger import COLUMNS, Result
from .run import Scenario

ROOT = Path(__file__).parents[2]
STATE = ROOT / ".torture.json"
REPORT = ROOT / "docs" / "reliability-report.md"

INTRODUCTION = """\
# Reliability report

<!-- Written by `make torture`. -->

`make torture` runs these scenarios in their long form. Each starts real processes (nats-server,
a database, gunicorn, relays, workers), kills them with SIGKILL or cuts their connections, and then
compares, in the database, what was committed with what the handlers did: *lost* is a committed
message without an effect, *duplicates* are effects beyond the first of a message. A short form of
each is part of `make test`. What is behind each fault: {doc}`reliability`.

"""


@dataclass(frozen=True)
class Entry:
    """One finished run of a long form.

    :param commit: what was run; with ``-dirty`` if files had been changed since.
    :param result: the fields of a ``Result``.
    :param seconds: how long it took.
    """

    name: str
    seed: int
    size: dict[str, int]
    commit: str
    date: str
    seconds: float
    versions: str
    result: dict[str, Any]

    @property
    def outcome(self) -> Result:
        """The result itself."""
        return Result(**self.result)


def commit() -> str:
    """The commit of the checkout, with ``-dirty`` if more than the report was changed since.

    Empty where there is no checkout.
    """
    head = _git("rev-parse", "--short", "HEAD")
    report = f":(exclude){REPORT.relative_to(ROOT)}"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", report)
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def versions() -> str:
    """What the scenarios run on."""
    server = subprocess.run([nats_server_binary(), "--version"], capture_output=True, text=True)
    number = re.search(r"v([\d.]+)", server.stdout)
    packages = ("nats-py", "Flask", "SQLAlchemy", "psycopg", "gunicorn")
    parts = [f"Python {platform.python_version()}", f"nats-server {number[1] if number else '?'}"]
    parts.append(f"PostgreSQL {postgres_version()}")
    return ", ".join(parts + [f"{name} {metadata.version(name)}" for name in packages])


class Kept:
    """The entries of earlier runs, in a file that is not committed."""

    def __init__(self, path: Path = STATE, report: Path = REPORT) -> None:
        self._path = path
        self._report = report
        self.entries: list[Entry] = []
        if path.exists():
            self.entries = [Entry(**one) for one in json.loads(path.read_text())]

    def find(self, scenario: Scenario, seed: int, version: str) -> Entry | None:
        """The good result of the same scenario, sizes and seed on the same commit."""
        if not version or version.endswith("-dirty"):
            return None
        for one in self.entries:
            same = (one.name, one.seed, one.size) == (scenario.name, seed, dict(scenario.long))
            if same and one.commit == version:
                return None if one.outcome.problems else one
        return None

    def add(
        self, scenario: Scenario, seed: int, version: str, result: Result, seconds: float
    ) -> None:
        """Keep a result instead of an older one of the same scenario.

        :param version: the commit as it was when the run began.
        """
        entry = Entry(
            name=scenario.name,
            seed=seed,
            size=dict(scenario.long),
            commit=version,
            date=datetime.now(UTC).date().isoformat(),
            seconds=round(seconds, 1),
            versions=versions(),
            result=dataclasses.asdict(result),
        )
        self.entries = [one for one in self.entries if one.name != scenario.name] + [entry]
        self._path.write_text(
            json.dumps([dataclasses.asdict(one) for one in self.entries], indent=1) + "\n"
        )

    def write_report(self, scenarios: Sequence[Scenario]) -> None:
        """Write the page that shows the newest result of each scenario."""
        by_name = {one.name: one for one in self.entries}
        head = ["scenario", *COLUMNS, "took"]
        lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
        details = []
        for scenario in scenarios:
            entry = by_name.get(scenario.name)
            lines.append(_row(entry) if entry else f"| {scenario.name} | not run |" + " |" * 6)
            details += _details(entry) if entry else []
        used = sorted({one.versions for one in self.entries})
        text = [INTRODUCTION, *lines, "", "Times are in seconds. Run with:", ""]
        text += [f"* {one}" for one in used] + ["", "## What was done", "", *details]
        self._report.write_text("\n".join(text).replace("\n\n\n", "\n\n").rstrip() + "\n")


def _row(entry: Entry) -> str:
    result = entry.outcome
    if not result.sent:  # it failed before anything was counted: 0 lost would be a lie
        return f"| {entry.name} | failed | | | | | | {entry.seconds:,.0f} |"
    counts = (result.sent, result.committed, result.effects, result.duplicates, result.lost)
    cells = [entry.name, *(f"{one:,}" for one in counts), f"{result.max_delay:.1f}"]
    return "| " + " | ".join([*cells, f"{entry.seconds:,.0f}"]) + " |"


def _details(entry: Entry) -> list[str]:
    result = entry.outcome
    size = ", ".join(f"{name} {value:,}" for name, value in entry.size.items())
    lines = [f"`{entry.name}`", f": Size: {size}; seed {entry.seed}; {entry.date}, {entry.commit}."]
    if result.facts:
        facts = ", ".join(f"{name} {value:,.6g}" for name, value in result.facts.items())
        lines.append(f"  Counted: {facts}.")
    lines += [f"  **Wrong: {problem}**" for problem in result.problems]
    return [*lines, ""]
