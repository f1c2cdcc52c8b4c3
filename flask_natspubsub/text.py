"""Makes strings from others safe for logs and terminals: one printable line.

Subjects, headers and error texts of the server and of handlers may contain anything. An escape
sequence in them could move the cursor, hide a line or forge one. This module is used at two
boundaries: by every error of the package (``errors.NatsPubsubError``), and for every line that
the package logs or prints.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable
from typing import Any

_NUMBERS = (int, float, bool, type(None))
#: Replaces a value whose ``__str__`` raises.
UNSHOWN = "(cannot be shown)"


def printable(text: object) -> str:
    """Return ``text`` as one line; characters that are not printable are escaped as in Python."""
    line = text if type(text) is str else _str(text)
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else _escape(char) for char in line)


def printable_lines(text: str) -> str:
    """Return ``text`` with all characters escaped that are neither printable nor line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def printable_traceback(parts: Iterable[str]) -> str:
    """Return the ``parts`` that ``traceback.format_exception`` returns as printable lines.

    Line breaks in the text of an error are escaped, because a new line could look like another
    log record. The result has no line break at its end.
    """
    safe = (
        printable_lines(part) if part.startswith(("  ", "\n")) else f"{printable(part[:-1])}\n"
        for part in parts
    )
    return "".join(safe).rstrip("\n")


def one_line(text: object, limit: int = 200) -> str:
    """Return ``text`` as a printable line of at most ``limit`` characters, without a full stop."""
    line = printable(_str(text)[: limit + 1]).rstrip(". ")
    return line if len(line) <= limit else line[: limit - 3] + "..."


def describe(error: BaseException) -> str:
    """Return the text of ``error`` as one printable line, or its class if it has no text."""
    return printable(" ".join(_str(error).split())) or type(error).__name__


def get_logger(name: str) -> logging.Logger:
    """Return the logger ``name``, with a filter that makes its records printable."""
    logger = logging.getLogger(name)
    if not any(isinstance(known, _Printable) for known in logger.filters):
        logger.addFilter(_Printable())
    return logger


class _Printable(logging.Filter):
    """Makes the arguments of a record and its traceback printable."""

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "is_printable", False):
            return True
        if isinstance(record.args, tuple):
            record.args = tuple(map(_fit, record.args))
        if record.exc_info and record.exc_info[0] is not None and not record.exc_text:
            parts = traceback.format_exception(*record.exc_info)
            safe = printable_traceback(parts)
            if safe != "".join(parts).rstrip("\n"):
                record.exc_text = safe  # a formatter uses it instead of making its own
        return True


def _fit(argument: Any) -> Any:
    if type(argument) in _NUMBERS:
        return argument
    line = argument if type(argument) is str else _str(argument)
    # Printable arguments are not converted: a formatter may use their repr or type.
    return printable(line) if line is UNSHOWN or not line.isprintable() else argument


def _str(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a broken __str__ must not hide the rest
        return UNSHOWN


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
