"""The pictures and tables of what is measured."""

from __future__ import annotations

from xml.etree import ElementTree

from tests.bench.curves import Curve, svg, tables

CURVES = [
    Curve("Relay", "pending & due", "rows", "ms", points={1_000: 2.5, 1_000_000: 5.0}),
    Curve("Relay", "sent", "rows", "ms", points={1_000: 1.0, 1_000_000: 0.5}),
    Curve("Payloads", "many", "bytes", "MB a second", False, {1: 10.0, 100: 200.0}),
]


def test_picture_has_a_line_and_a_dot_for_each_figure() -> None:
    picture = svg(CURVES)
    names = [element.tag.rpartition("}")[2] for element in ElementTree.fromstring(picture).iter()]
    assert names.count("circle") == 6
    assert picture.count('stroke-width="2"') == 3
    assert "pending &amp; due" in picture


def test_table_has_a_row_for_each_curve_and_a_column_for_each_size() -> None:
    text = tables(CURVES)
    assert text.count(".. list-table::") == 2
    assert "   * - rows\n     - 1,000\n     - 1,000,000\n" in text
    assert "   * - sent\n     - 1.00\n     - 0.50\n" in text


def test_ratio_says_how_much_of_the_smallest_the_largest_keeps() -> None:
    assert [curve.comparison(None).ratio for curve in CURVES] == [0.5, 2.0, 20.0]
