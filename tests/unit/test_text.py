"""Text made fit for logs and terminals."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import flask_natspubsub
from flask_natspubsub import NatsPubsubError, text

HOSTILE = "\x1b[31mred\x07 \u202eabc\r\nforged line"


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("Müller 日本", "Müller 日本"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("abc\u202ecba", "abc\\u202ecba"),
        ("\ud800", "\\ud800"),
        (5, "5"),
    ],
)
def test_printable_is_one_line_without_control_characters(raw: object, shown: str) -> None:
    assert text.printable(raw) == shown


def test_one_line_is_cut_and_has_no_full_stop() -> None:
    assert text.one_line("The end. ") == "The end"
    assert text.one_line("x" * 300) == "x" * 197 + "..."
    assert text.one_line(HOSTILE).isprintable()


def test_an_error_says_what_others_have_sent_in_printable_form() -> None:
    error = NatsPubsubError(f"The server said {HOSTILE}", f"Ask {HOSTILE}")
    assert str(error).isprintable()
    assert error.message.isprintable()
    assert error.fix.isprintable()
    assert all(str(argument).isprintable() for argument in error.args)


# --- what is logged


@pytest.fixture
def logged() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger of the package, and what a handler of the user's writes."""
    logger, out = text.get_logger("flask_natspubsub.test_text"), io.StringIO()
    handler = logging.StreamHandler(out)
    logger.addHandler(handler)
    logger.propagate = False
    yield logger, out
    logger.removeHandler(handler)


class Shy:
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    "argument", [HOSTILE, ValueError(HOSTILE), Path(f"/tmp/{HOSTILE}"), Shy(), 5, None]
)
def test_a_record_is_one_printable_line_whoever_formats_it(
    logged: tuple[logging.Logger, io.StringIO], argument: object
) -> None:
    logger, out = logged
    logger.warning("%s and %s", argument, "more")
    line = out.getvalue()
    assert line.count("\n") == 1
    assert line.rstrip("\n").isprintable()


def test_a_traceback_has_no_control_characters(
    logged: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, out = logged
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logger.exception("failed")
    lines = out.getvalue().rstrip("\n").split("\n")
    assert lines[0] == "failed"
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1].startswith("ValueError: \\x1b[31mred")  # its text cannot begin a line
    assert lines[-1].endswith("\\r\\nforged line")
    assert all(line.isprintable() for line in lines)


def test_a_traceback_that_is_printable_is_left_to_the_formatter(
    logged: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, _ = logged
    records: list[logging.LogRecord] = []
    logger.addFilter(lambda record: records.append(record) is None)
    try:
        raise ValueError("fine")
    except ValueError as error:
        logger.warning("failed", exc_info=(type(error), error, None))
    logger.filters.pop()
    assert records[0].exc_info is not None


def test_every_logger_of_the_package_is_such_a_logger() -> None:
    house = Path(flask_natspubsub.__file__).parent
    raw = [
        path.name
        for path in house.rglob("*.py")
        if path.name != "text.py"
        for found in re.findall(r"logging\.getLogger\((.*?)\)", path.read_text("utf-8"))
        if found != '"flask_natspubsub"'  # to configure it, not to write to it
    ]
    assert raw == []
