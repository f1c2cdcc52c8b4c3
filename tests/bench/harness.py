"""Interleaved runs, medians, ratios: machines are shared, only ratios within one run count."""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Variant:
    """Something to be measured: ``run`` returns operations a second, or what its name says."""

    name: str
    run: Callable[[], float]
    results: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.results)


@dataclass
class Comparison:
    """One of ours, what it is measured against, and the ratio it has to reach.

    :param at_most: the ratio may not be above ``must``: of times and sizes, not of rates.
    :param differs: how it differs from what people run; empty if it does not.
    """

    ours: Variant
    reference: Variant
    must: float | None = None
    at_most: bool = False
    differs: str = ""

    @property
    def ratio(self) -> float:
        """The median of the ratios of each round, which outlasts a change of the weather."""
        pairs = zip(self.ours.results, self.reference.results, strict=True)
        return statistics.median(ours / other for ours, other in pairs)

    @property
    def verdict(self) -> str:
        if self.must is None:
            return ""
        if self.at_most:
            return "ok" if self.ratio <= self.must else "ABOVE"
        return "ok" if self.ratio >= self.must else "BELOW"


def measure(comparisons: Iterable[Comparison], rounds: int) -> list[Comparison]:
    """Run all variants in turn, ``rounds`` times, after one round that does not count."""
    wanted = list(comparisons)
    variants = list({id(v): v for c in wanted for v in (c.reference, c.ours)}.values())
    for number in range(rounds + 1):
        for variant in variants:
            print(f"\r\033[K  round {number}/{rounds}: {variant.name}", end="", file=sys.stderr)
            gc.collect()
            result = variant.run()
            if number:
                variant.results.append(result)
    print("\r\033[K", end="", file=sys.stderr)
    return wanted


def table(comparisons: Iterable[Comparison]) -> str:
    """Return the table that is printed."""
    rows = [("ours", "median", "against", "median", "ratio", "must", "")]
    for one in comparisons:
        must = "" if one.must is None else f"{'<= ' if one.at_most else ''}{one.must:.2f}"
        rows.append(
            (
                one.ours.name,
                _figure(one.ours.median),
                one.reference.name,
                _figure(one.reference.median),
                f"{one.ratio:.2f}",
                must,
                one.verdict,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def write_json(path: Path, part: str, comparisons: Iterable[Comparison]) -> list[dict[str, Any]]:
    """Write every figure of every round in place of what the file has of this part.

    :returns: all that is in the file now.
    """
    known = json.loads(path.read_text("utf-8")) if path.exists() else []
    rows = [row for row in known if row.get("part") != part]
    rows += [
        {
            "part": part,
            "ours": one.ours.name,
            "against": one.reference.name,
            "ratio": round(one.ratio, 3),
            "must": one.must,
            "at_most": one.at_most,
            "differs": one.differs,
            "ours_per_second": [round(value, 3) for value in one.ours.results],
            "against_per_second": [round(value, 3) for value in one.reference.results],
        }
        for one in comparisons
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return rows
