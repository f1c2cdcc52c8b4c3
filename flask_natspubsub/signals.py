"""Blinker signals the extension sends; the sender is always the Flask application object.

Receivers run in the thread that sends the signal and should be quick. An exception in a
receiver is logged and not passed on, so that no message is lost or repeated because of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from blinker import NamedSignal, Namespace

from .text import get_logger

_log = get_logger("flask_natspubsub")
_signals = Namespace()

#: A message was stored by the broker. ``receipt``
message_published = _signals.signal("message-published")
#: A message was decoded and is about to be handled. ``context``
message_received = _signals.signal("message-received")
#: A handler returned and the message was acknowledged. ``context``, ``seconds``
message_handled = _signals.signal("message-handled")
#: A message will be delivered again. ``context``, ``delay``, ``error``
message_retried = _signals.signal("message-retried")
#: A message was given up. ``context`` (None if it could not be read), ``reason``, ``error``
message_dead_lettered = _signals.signal("message-dead-lettered")
#: The relay sent outbox rows. ``count``
outbox_relayed = _signals.signal("outbox-relayed")
#: A worker began to pull messages. ``worker``
worker_started = _signals.signal("worker-started")
#: A worker has stopped. ``worker``
worker_stopped = _signals.signal("worker-stopped")


def call_guarded(what: str, function: Callable[..., object], *args: Any, **named: Any) -> None:
    """Call a function of the user's and log the exception that it raises.

    ``SystemExit`` is logged too, because it would end a thread that does other work.
    ``KeyboardInterrupt`` is passed on in the main thread, where Ctrl-C raises it.

    :param what: the function's name in the log.
    """
    try:
        function(*args, **named)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if isinstance(error, KeyboardInterrupt) and in_main_thread:
            raise
        _log.exception("%s failed", what)


def send(signal: NamedSignal, sender: Any, **arguments: Any) -> None:
    """Send ``signal``, and log exceptions of receivers instead of passing them on."""
    for receiver in signal.receivers_for(sender):
        call_guarded(f"a receiver of the signal {signal.name!r}", receiver, sender, **arguments)
