"""Interleaved runs, medians, ratios: machines are shared, only ratios within one run count."""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Variant:
    """Something to be measured: ``run`` returns operations a second."""

    name: str
    run: Callable[[], float]
    results: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.results)


@dataclass
class Comparison:
    """One of ours, what it is measured against, and the ratio it has to reach."""

    ours: Variant
    reference: Variant
    must: float | None = None

    @property
    def ratio(self) -> float:
        """The median of the ratios of each round, which outlasts a change of the weather."""
        pairs = zip(self.ours.results, self.reference.results, strict=True)
        return statistics.median(ours / other for ours, other in pairs)

    @property
    def verdict(self) -> str:
        if self.must is None:
            return ""
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
    rows = [("ours", "per second", "against", "per second", "ratio", "must", "")]
    for one in comparisons:
        must = "" if one.must is None else f"{one.must:.2f}"
        rows.append(
            (
                one.ours.name,
                f"{one.ours.median:,.0f}",
                one.reference.name,
                f"{one.reference.median:,.0f}",
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


def write_json(path: Path, comparisons: Iterable[Comparison]) -> None:
    """Write every figure of every round."""
    rows = [
        {
            "ours": one.ours.name,
            "against": one.reference.name,
            "ratio": round(one.ratio, 3),
            "must": one.must,
            "ours_per_second": [round(value) for value in one.ours.results],
            "against_per_second": [round(value) for value in one.reference.results],
        }
        for one in comparisons
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
