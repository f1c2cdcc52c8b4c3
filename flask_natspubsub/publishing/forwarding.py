"""Publishes blinker signals as messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blinker import Signal

from ..errors import RegistrationError

#: Makes a message from a signal: ``(sender, **arguments) -> message``; None publishes nothing.
Build = Callable[..., Any]


def forward(signal: Signal, build: Build | None, publish: Callable[[Any], object]) -> None:
    """Call ``publish`` with the message that ``build`` returns, whenever ``signal`` is sent.

    :param build: default: the message is the dict of the signal's keyword arguments.
    :raises RegistrationError: not a blinker signal.
    """
    if not isinstance(signal, Signal):
        raise RegistrationError(
            f"{signal!r} is not a blinker signal.", "Make one with blinker.signal('name')."
        )

    def receiver(sender: Any, **arguments: Any) -> None:
        message = arguments if build is None else build(sender, **arguments)
        if message is not None:
            publish(message)

    signal.connect(receiver, weak=False)
