"""Restores the default handlers of signals, as a terminal has them.

A shell that is not interactive has its background jobs ignore SIGINT, ``nohup`` SIGHUP. A process
that is started hands that on to those it starts, and the tests send both to theirs.
"""

from __future__ import annotations

import signal

_HANDLERS = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL} | dict.fromkeys(
    ("SIGHUP", "SIGQUIT"), signal.SIG_DFL
)


def restore() -> None:
    """Stop ignoring the signals; call it in the main thread."""
    for name, handler in _HANDLERS.items():
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
