"""Curves of what grows with what, as a picture and as tables for the documentation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

from .harness import Comparison, Variant

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 430, 270, 58, 40, 14, 88
COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2")


@dataclass
class Curve:
    """What was measured for each size.

    :param panel: the picture that it is drawn in, together with others.
    :param falling: whether less is better, as of a time.
    """

    panel: str
    name: str
    x: str
    y: str
    falling: bool = True
    points: dict[int, float] = field(default_factory=dict)

    def add(self, size: int, value: float) -> None:
        self.points[size] = value

    def comparison(self, must: float | None) -> Comparison:
        """Return the largest size against the smallest, so that 1 means that nothing is lost."""
        (small, first), *_, (large, last) = self.points.items()
        name = f"{self.panel}, {self.name}".rstrip(", ")
        ours = Variant(f"{name}, {large:,}", lambda: 0.0, [1000 / last if self.falling else last])
        reference = Variant(f"the same, {small:,}", lambda: 0.0)
        reference.results.append(1000 / first if self.falling else first)
        return Comparison(ours, reference, must)


def panels(curves: Iterable[Curve]) -> list[tuple[str, list[Curve]]]:
    """Put the curves of one panel together, in the order given."""
    return [(name, list(found)) for name, found in groupby(curves, lambda curve: curve.panel)]


def figure(value: float) -> str:
    """Write a figure with the digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def tables(curves: Sequence[Curve]) -> str:
    """Return a table in reStructuredText for each panel."""
    return "\n".join(_table(name, found) for name, found in panels(curves))


def _table(name: str, curves: list[Curve]) -> str:
    lines = [f".. list-table:: {name}, {curves[0].y}", "   :header-rows: 1", ""]
    rows = [[curves[0].x, *(f"{size:,}" for size in curves[0].points)]]
    rows += [[curve.name, *map(figure, curve.points.values())] for curve in curves]
    for row in rows:
        lines += [f"   {'-' if n else '* -'} {cell}" for n, cell in enumerate(row)]
    return "\n".join(line.replace("   - ", "     - ") for line in lines) + "\n"


def svg(curves: Sequence[Curve]) -> str:
    """Draw all panels, two in a row."""
    found = panels(curves)
    height = math.ceil(len(found) / 2) * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="11" fill="#374151">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for number, (name, members) in enumerate(found):
        x, y = number % 2 * WIDTH, number // 2 * HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *_panel(name, members), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(name: str, curves: list[Curve]) -> list[str]:
    sizes = list(curves[0].points)
    top = _round_up(max(max(curve.points.values()) for curve in curves))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<text x="{LEFT}" y="20" font-size="13" font-weight="600">{escape(name)}</text>']
    for step in range(5):
        y = bottom - (bottom - TOP) * step / 4
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#e5e7eb"/>')
        label = f"{top * step / 4:,g}"
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for size in sizes:
        x = _across(size, sizes)
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_short(size)}</text>'
        )
    parts.append(f'<text x="{LEFT}" y="{TOP - 7}" fill="#6b7280">{escape(curves[0].y)}</text>')
    parts.append(
        f'<text x="{right}" y="{bottom + 30}" text-anchor="end" fill="#6b7280">'
        f"{escape(curves[0].x)}</text>"
    )
    for number, curve in enumerate(curves):
        parts += _line(number, curve, sizes, top)
    return parts


def _line(number: int, curve: Curve, sizes: list[int], top: float) -> list[str]:
    colour, bottom = COLOURS[number], HEIGHT - BOTTOM
    dots = [
        (_across(size, sizes), bottom - (bottom - TOP) * value / top)
        for size, value in curve.points.items()
    ]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in dots)
    parts = [f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in dots]
    x = LEFT + number % 2 * (WIDTH - LEFT) // 2
    y = bottom + 46 + number // 2 * 14
    parts.append(f'<rect x="{x}" y="{y - 8}" width="9" height="9" fill="{colour}"/>')
    parts.append(f'<text x="{x + 14}" y="{y}">{escape(curve.name)}</text>')
    return parts


def _across(size: int, sizes: list[int]) -> float:
    """Return where a size is: each is so many times as large as the one before."""
    low, high = math.log(sizes[0]), math.log(sizes[-1])
    return LEFT + 14 + (WIDTH - RIGHT - LEFT - 28) * (math.log(size) - low) / (high - low)


def _round_up(value: float) -> float:
    magnitude: float = 10 ** math.floor(math.log10(value))
    return next(
        step * magnitude for step in (1, 1.2, 1.6, 2, 3, 4, 6, 8, 10) if step * magnitude >= value
    )


def _short(size: int) -> str:
    for unit, name in ((1_000_000, "M"), (1_000, "k")):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{name}"
    return f"{size:,}"
