"""The bars and tables of what is measured."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.bench import bars as module
from tests.bench.bars import LEFT, MET, MISSED, RIGHT, WIDTH, bars, rst_table, write_pages

SVG = "{http://www.w3.org/2000/svg}"


def row(
    ours: str, ratio: float, must: float | None, *, part: str = "publish", at_most: bool = False
) -> dict[str, Any]:
    return {
        "part": part,
        "ours": ours,
        "against": "naive <gather>(1000)",
        "ratio": ratio,
        "must": must,
        "at_most": at_most,
        "ours_per_second": [1000 * ratio, 1300 * ratio, 700 * ratio],
        "against_per_second": [1000, 1000, 1000],
    }


ROWS = [
    row("publish_many(1000)", 4.2, 3),
    row("publish, 32 threads", 2.0, 2.5),
    row("batch() of 1000", 3.9, None),
    row("relay & mark", 600, 30, part="outbox"),
    row("commit to handler, ms", 4, 5, part="overheads", at_most=True),
    row("empty request, us", 1.5, 1.2, part="overheads", at_most=True),
    row("what has a name that is much too long for one line beside its bar", 1.0, 0.9, part="z"),
]


def widths(picture: str) -> list[float]:
    """Return how long the bars are, where 1 reaches the line of the budget."""
    rects = ElementTree.fromstring(picture).iter(f"{SVG}rect")
    lengths = [float(rect.attrib["width"]) for rect in rects if rect.get("class") == "bar"]
    return [length / (RIGHT - LEFT) * 3 for length in lengths]


def test_every_comparison_is_there_with_its_ratio_and_its_budget() -> None:
    groups = list(ElementTree.fromstring(bars(ROWS)).iter(f"{SVG}g"))
    for one, group in zip(ROWS, groups, strict=True):
        title, *texts = [element.text or "" for element in group.iter() if element.text]
        assert title.startswith(f"{one['ours']} against {one['against']}: ")
        assert f"{one['ours']} against {one['against']}" in " ".join(texts)
    assert "must be at least 3<" in bars(ROWS[:1])
    assert ">4.20<" in bars(ROWS[:1])
    assert "must be at most 5<" in bars(ROWS[4:5])
    assert "no budget<" in bars(ROWS[2:3])


def test_bar_reaches_the_line_if_the_budget_is_met() -> None:
    lengths = widths(bars(ROWS))
    assert lengths == pytest.approx([1.4, 0.8, 3, 1.25, 0.8, 1.11], abs=0.01)
    assert bars(ROWS[:1]).count(MISSED) == 0
    assert bars(ROWS[1:2]).count(MET) == 0
    assert "20.0 \u203a" in bars(ROWS)  # cut off


def test_all_is_inside_the_picture_and_nothing_overlaps() -> None:
    root = ElementTree.fromstring(bars(ROWS))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    places = []
    for text in root.iter(f"{SVG}text"):
        x, y = float(text.attrib["x"]), float(text.attrib["y"])
        length = len(text.text or "") * 5
        left = {"end": x - length, "middle": x - length / 2}.get(text.attrib["text-anchor"], x)
        assert left >= 0
        assert left + length <= width == WIDTH
        assert 0 < y < height
        places.append((text.attrib["text-anchor"], x, y))
    assert len(set(places)) == len(places)
    labels = sorted(y for anchor, x, y in places if anchor == "end" and x < LEFT)
    assert min(b - a for a, b in pairwise(labels)) >= 15
    for rect in root.iter(f"{SVG}rect"):
        x, y = float(rect.get("x", 0)), float(rect.get("y", 0))
        assert x + float(rect.attrib["width"]) <= WIDTH
        assert y + float(rect.attrib["height"]) <= height


def test_rows_of_another_version_are_drawn_too() -> None:
    old = {"ours": "ours", "against": "theirs", "ratio": 1.5, "must": 1}
    assert widths(bars([old])) == pytest.approx([3])  # all of a scale that ends at 1.5
    assert "list-table:: Other" in rst_table([old])


def test_table_has_a_row_for_each_comparison() -> None:
    text = rst_table(ROWS)
    assert text.count(".. list-table::") == 4
    assert text.count("   * - ") == 4 + len(ROWS)
    wanted = ["publish\\_many(1000)", "4,200", "naive <gather>(1000)", "1,000", "4.20"]
    assert "   * - " + "\n     - ".join([*wanted, "\u2265 3"]) + "\n" in text
    assert "     - **2.00**\n     - \u2265 2.5\n" in text


def test_pages_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "version", lambda name: f"(version of {name})")
    (tmp_path / "_static").mkdir()
    write_pages(ROWS, tmp_path)
    assert (tmp_path / "_static" / "bench.svg").read_text("utf-8") == bars(ROWS)
    page = (tmp_path / "performance-table.rst").read_text("utf-8")
    assert ".. image:: _static/bench.svg" in page
    assert "3 rounds on " in page
    assert "(version of nats-py)" in page
    assert page.endswith(rst_table(ROWS))
