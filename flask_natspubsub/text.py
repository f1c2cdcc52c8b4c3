"""Text that others had a hand in, made fit for logs and terminals: printable, in one line.

Subjects, headers, error texts of the server and of handlers may hold anything, and an escape
sequence in them could move a cursor, hide a line or forge one. Two boundaries use this module:
every error of the package (``errors.NatsPubsubError``) and every line that it logs or prints.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable
from typing import Any

_NUMBERS = (int, float, bool, type(None))
#: Stands for what has no text, because its ``__str__`` raises.
UNSHOWN = "(cannot be shown)"


def printable(text: object) -> str:
    """Return ``text`` in one line, with all that is not printable escaped as Python writes it."""
    line = text if type(text) is str else _str(text)
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else _escape(char) for char in line)


def printable_lines(text: str) -> str:
    """Return ``text`` with all that is not printable escaped, but for its line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def printable_traceback(parts: Iterable[str]) -> str:
    """Return what ``traceback.format_exception`` gives, printable, without a line end at its end.

    The text of an error stays in its line: one that begins anew could look like another record.
    """
    safe = (
        printable_lines(part) if part.startswith(("  ", "\n")) else f"{printable(part[:-1])}\n"
        for part in parts
    )
    return "".join(safe).rstrip("\n")


def one_line(text: object, limit: int = 200) -> str:
    """Return ``text`` printable and cut at ``limit`` characters, without a full stop at its end."""
    line = printable(_str(text)[: limit + 1]).rstrip(". ")
    return line if len(line) <= limit else line[: limit - 3] + "..."


def describe(error: BaseException) -> str:
    """Return what ``error`` says in one line, or its class if it says nothing."""
    return printable(" ".join(_str(error).split())) or type(error).__name__


def get_logger(name: str) -> logging.Logger:
    """Return the logger ``name``, whose records are printable whoever formats them."""
    logger = logging.getLogger(name)
    if not any(isinstance(known, _Printable) for known in logger.filters):
        logger.addFilter(_Printable())
    return logger


class _Printable(logging.Filter):
    """Makes the arguments of a record printable, and the traceback that goes with it."""

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
    # What is printable stays as it is: a formatter may write its repr, or look at its type.
    return printable(line) if line is UNSHOWN or not line.isprintable() else argument


def _str(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a broken __str__ must not hide the rest
        return UNSHOWN


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
