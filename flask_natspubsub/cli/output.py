"""Output of commands: tables, JSON, durations; printable, so it cannot harm a terminal."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from ..text import printable

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw]?)", re.ASCII)


def duration(text: str) -> float:
    """Return the seconds of ``30s``, ``10m``, ``2h``, ``1d``, ``1w`` or a plain number."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise click.BadParameter(f"{text!r} is no duration; use one such as 30s, 10m, 2h or 1d.")
    return float(found[1]) * _UNITS[found[2]]


def is_terminal(stream: Any) -> bool:
    """Whether ``stream`` is a terminal."""
    return bool(stream.isatty())


def width() -> int | None:
    """Return the width of stdout in columns; None if it is not a terminal."""
    return shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None


def cut(text: str, columns: int | None) -> str:
    """Return ``text``, cut to fit into ``columns``."""
    if columns is None or len(text) <= columns:
        return text
    return text[: max(0, columns - 1)] + "…"


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print one JSON value in printable ASCII, which is safe for any terminal and encoding."""
    # JSON escapes all ASCII control characters but this one.
    click.echo(json.dumps(value, indent=indent).replace("\x7f", "\\u007f"))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; on a terminal its lines are cut to fit."""
    lines = [list(columns), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for number, line in enumerate(lines):
        padded = "  ".join(
            cell.ljust(size) for cell, size in zip(line, widths, strict=True)
        ).rstrip()
        click.echo(click.style(cut(padded, width()), bold=number == 0))


def print_fields(fields: Iterable[tuple[str, object]], indent: str = "") -> None:
    """Print names and values, one pair a line."""
    pairs = list(fields)
    longest = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        text = "-" if value is None else printable(value)
        click.echo(f"{indent}{name.ljust(longest)}  {text}".rstrip())
