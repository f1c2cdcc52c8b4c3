"""Waiting for things that happen in other threads and processes, with a bound."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_never = threading.Event()


def eventually(
    predicate: Callable[[], T], timeout: float = 10.0, message: str = "", interval: float = 0.01
) -> T:
    """Return the first true value of ``predicate``; AssertionError after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(message or f"not so within {timeout} s (last: {value!r})")
        _never.wait(interval)


def for_seconds(seconds: float, action: Callable[[], object], interval: float = 0.1) -> None:
    """Repeat ``action`` for some time, for tests of what must not happen meanwhile."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        action()
        _never.wait(interval)
