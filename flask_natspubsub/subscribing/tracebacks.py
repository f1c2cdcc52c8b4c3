"""Tracebacks of handlers: without this package's frames, whole or in one line."""

from __future__ import annotations

import os
import sysconfig
import textwrap
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from ..text import printable_traceback

_OURS = f"{Path(__file__).parents[1]}{os.sep}"
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib")})

#: Limit of a logged traceback in characters; its end is kept, which is the part that counts.
TEXT_LIMIT = 16_384
#: Limits of the frames, the innermost, and of the characters kept with a dead letter.
FRAMES, FRAMES_LIMIT = 8, 1024


def of_application(error: BaseException) -> TracebackType | None:
    """Return the traceback of ``error`` from the application's first frame on.

    None if it has none: this package raised the error, before or after the handler.
    """
    others = [step for step in _steps(error) if not _is_ours(step)]
    own = [step for step in others if not _is_of_library(step)]
    return next(iter(own or others), None)


def place_of_error(error: BaseException) -> str:
    """Return ``file:line`` where the application's code failed; empty if another's did."""
    steps = [step for step in _steps(error, of_application(error)) if not _is_ours(step)]
    own = [step for step in steps if not _is_of_library(step)] or steps
    return _place(own[-1]) if own else ""


def frames_of(error: BaseException) -> str:
    """Return the innermost frames in one line of ASCII; the frame that raised is last."""
    steps = list(_steps(error, of_application(error)))[-FRAMES:]
    line = " > ".join(f"{_place(step)} in {step.tb_frame.f_code.co_name}" for step in steps)
    line = line.encode("unicode_escape").decode("ascii")
    return line if len(line) <= FRAMES_LIMIT else f"...{line[3 - FRAMES_LIMIT :]}"


def text_of(error: BaseException, frames: TracebackType | None) -> str:
    """Return the traceback as it is logged: indented, and printable except for line breaks."""
    text = printable_traceback(traceback.format_exception(type(error), error, frames))
    if len(text) > TEXT_LIMIT:
        text = f"...{text[-TEXT_LIMIT:]}"
    return textwrap.indent(text, "  ")


def _steps(error: BaseException, start: TracebackType | None = None) -> Iterator[TracebackType]:
    step = start or error.__traceback__
    while step is not None:
        yield step
        step = step.tb_next


def _is_ours(step: TracebackType) -> bool:
    return step.tb_frame.f_code.co_filename.startswith(_OURS)


def _is_of_library(step: TracebackType) -> bool:
    return step.tb_frame.f_code.co_filename.startswith((*_LIBRARIES, "<frozen"))


def _place(step: TracebackType) -> str:
    return f"{_shortened(step.tb_frame.f_code.co_filename)}:{step.tb_lineno}"


def _shortened(path: str) -> str:
    """Return the path relative to the working directory, if it is below it."""
    try:
        return path.removeprefix(f"{os.getcwd()}{os.sep}")  # noqa: PTH109 - at each failure
    except OSError:  # the directory was removed
        return path
