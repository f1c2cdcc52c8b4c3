"""What was measured as a picture of bars and as tables, for the documentation.

Both are made from the rows of ``results.json``; a row may lack ``part``, ``at_most`` and
``differs``.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .curves import figure

WIDTH, MARGIN, LINE, GAP, HEADING, TOP, BOTTOM = 780, 16, 16, 11, 36, 66, 36
#: Where bars begin and end; the labels are left of them, the figures right.
LEFT, RIGHT = 308, 622
#: What fits into a line of a label, in a wide font.
CHARACTERS = 43
#: A bar that would be longer than so many times the budget is cut off, and says so.
LONGEST = 3.0
BAR = 14
MET, MISSED, INK, PALE = "#0b6e4f", "#c2410c", "#1f2937", "#6b7280"
_PAGE = """.. This is written by ``make bench``.

.. image:: _static/bench.svg
   :class: diagram
   :alt: A bar for each comparison; those that reach the line meet their budget

{text}
{tables}"""
_COLUMNS = ("ours", "median", "against", "median", "ratio", "must be", "as people run it?")
_WIDTHS = "24 9 24 9 8 8 18"


@dataclass(frozen=True)
class Row:
    """One comparison, as ``results.json`` has it."""

    part: str
    ours: str
    against: str
    ratio: float
    must: float | None
    at_most: bool
    ours_results: Sequence[float]
    against_results: Sequence[float]
    differs: str = ""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Row:
        return cls(
            part=row.get("part") or "other",
            ours=row["ours"],
            against=row["against"],
            ratio=row["ratio"],
            must=row.get("must"),
            at_most=bool(row.get("at_most")),
            ours_results=row.get("ours_per_second") or [],
            against_results=row.get("against_per_second") or [],
            differs=row.get("differs") or "",
        )

    @property
    def label(self) -> str:
        return f"{self.ours} against {self.against}"

    @property
    def limit(self) -> str:
        """The budget in words; empty if there is none."""
        if self.must is None:
            return ""
        return f"{'at most' if self.at_most else 'at least'} {self.must:g}"

    def score(self, ratio: float) -> float:
        """Return how a ratio stands to the budget: 1 is just met, more is better."""
        assert self.must is not None
        return self.must / max(ratio, 0.001) if self.at_most else ratio / self.must

    @property
    def is_missed(self) -> bool:
        return self.must is not None and self.score(self.ratio) < 1

    @property
    def rounds(self) -> list[float]:
        """The ratio of each round."""
        pairs = zip(self.ours_results, self.against_results, strict=True)
        return [ours / other for ours, other in pairs if other]


def write_pages(rows: Iterable[Mapping[str, Any]], docs: Path) -> None:
    """Write the picture, and the page with it and the tables that performance.rst includes."""
    found = list(rows)
    (docs / "_static" / "bench.svg").write_text(bars(found), "utf-8")
    rounds = max(len(Row.of(row).rounds) for row in found)
    text = (
        f"{rounds} rounds on {os.cpu_count()} processors, Python {platform.python_version()}, "
        f"nats-py {version('nats-py')}, FastStream {version('faststream')}.\n"
    )
    page = _PAGE.format(text=text, tables=rst_table(found))
    (docs / "performance-table.rst").write_text(page, "utf-8")


def rst_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a table in reStructuredText for each part."""
    return "\n".join(_table(part, found) for part, found in _parts(rows).items())


def _table(part: str, rows: list[Row]) -> str:
    lines = [f".. list-table:: {part.capitalize()}", "   :header-rows: 1"]
    lines += [f"   :widths: {_WIDTHS}", ""]
    for cells in (_COLUMNS, *map(_cells, rows)):
        lines += [f"   {'  -' if n else '* -'} {cell}".rstrip() for n, cell in enumerate(cells)]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    ratio = figure(row.ratio)
    return (
        _literal(row.ours),
        _median(row.ours_results),
        _literal(row.against),
        _median(row.against_results),
        f"**{ratio}**" if row.is_missed else ratio,
        row.limit.replace("at least", "\u2265").replace("at most", "\u2264"),
        f"no: {_literal(row.differs)}" if row.differs else "yes",
    )


def _literal(text: str) -> str:
    """Keep reStructuredText from seeing markup in a name."""
    return re.sub(r"([\\*`|_])", r"\\\1", text)


def _median(values: Sequence[float]) -> str:
    if not values:
        return ""
    value = statistics.median(values)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _parts(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Row]]:
    """Put the rows of one part together, in the order of their first."""
    parts: dict[str, list[Row]] = {}
    for row in map(Row.of, rows):
        parts.setdefault(row.part, []).append(row)
    return parts


def bars(rows: Iterable[Mapping[str, Any]]) -> str:
    """Draw a bar for each comparison; what it must reach is the same line for all.

    A comparison without a budget has its ratio as text, and no bar.
    """
    parts = _parts(rows)
    scale = _Scale.of(row for found in parts.values() for row in found)
    body: list[str] = []
    y = TOP
    for part, found in parts.items():
        y += HEADING
        body.append(_text(MARGIN, y - 12, part.capitalize(), size=14, weight=600))
        for row in found:
            lines = _label(row)
            body += _row(row, lines, y, scale)
            y += len(lines) * LINE + GAP
    return "\n".join([*_frame(y, scale), *body, *_budget_line(y, scale), "</svg>"]) + "\n"


@dataclass(frozen=True)
class _Scale:
    """How long a bar is."""

    top: float

    @classmethod
    def of(cls, rows: Iterable[Row]) -> _Scale:
        scores = [row.score(row.ratio) for row in rows if row.must is not None]
        return cls(min(LONGEST, max([1.5, *scores])))

    def x(self, score: float) -> float:
        return LEFT + (RIGHT - LEFT) * min(max(score, 0), self.top) / self.top


def _frame(bottom: float, scale: _Scale) -> Iterator[str]:
    height = bottom + BOTTOM
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">'
    )
    yield f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#ffffff"/>'
    yield _text(MARGIN, 28, "The measured ratio, divided by what it must be", size=15, weight=600)
    for number in range(2 * int(scale.top) + 2):
        tick = number / 2
        if tick > scale.top:
            break
        x = scale.x(tick)
        yield f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="#e5e7eb"/>'
        if tick != 1:
            yield _text(x, TOP - 8, f"{tick:g}", colour=PALE, anchor="middle")
    yield _text(
        MARGIN,
        bottom + 20,
        "Thin lines: the lowest and the highest round. At most: the bar is what it may be, "
        "divided by what it is.",
        colour=PALE,
    )


def _budget_line(bottom: float, scale: _Scale) -> Iterator[str]:
    x = scale.x(1)
    yield _text(x, TOP - 8, "just met", weight=600, anchor="middle")
    yield f'<path d="M{x:.1f} {TOP - 3}V{bottom}" stroke="{INK}" stroke-width="1.5"/>'


def _label(row: Row) -> list[tuple[str, str]]:
    """Return the lines of a label with their colours."""
    ours = textwrap.wrap(row.ours, CHARACTERS)
    against = textwrap.wrap(f"against {row.against}", CHARACTERS)
    return [(line, INK) for line in ours] + [(line, PALE) for line in against]


def _row(row: Row, lines: list[tuple[str, str]], y: float, scale: _Scale) -> Iterator[str]:
    ratio, limit = figure(row.ratio), f"must be {row.limit}" if row.limit else "no budget"
    yield f"<g><title>{escape(row.label)}: {ratio}, {limit}</title>"
    for number, (line, colour) in enumerate(lines):
        yield _text(LEFT - 12, y + 12 + number * LINE, line, colour=colour, anchor="end")
    middle = y + len(lines) * LINE / 2
    if row.must is not None:
        yield from _bar(row, middle, scale)
    colour = INK if row.must is None else MISSED if row.is_missed else MET
    yield _text(RIGHT + 16, middle - 3, ratio, size=14, weight=600, colour=colour)
    yield _text(RIGHT + 16, middle + 13, limit, colour=MISSED if row.is_missed else PALE)
    yield "</g>"


def _bar(row: Row, middle: float, scale: _Scale) -> Iterator[str]:
    score = row.score(row.ratio)
    end = scale.x(score)
    yield (
        f'<rect class="bar" x="{LEFT}" y="{middle - BAR / 2:.1f}" width="{end - LEFT:.1f}" '
        f'height="{BAR}" rx="2" fill="{MISSED if row.is_missed else MET}"/>'
    )
    if score > scale.top:
        yield _text(end - 8, middle + 4, f"{score:.1f} \u203a", colour="#ffffff", anchor="end")
        return
    found = [row.score(ratio) for ratio in row.rounds]
    if len(found) > 1:
        line = f"M{scale.x(min(found)):.1f} {middle:.1f}H{scale.x(max(found)):.1f}"
        yield f'<path d="{line}" stroke="#ffffff" stroke-width="4"/>'  # seen on the bar, too
        yield f'<path d="{line}" stroke="{INK}" stroke-width="1.5"/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    weight: int = 400,
    colour: str = INK,
    anchor: str = "start",
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
