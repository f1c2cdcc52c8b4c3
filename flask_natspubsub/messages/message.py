"""A message as it travels: the one shape inside the package.

A draft becomes a ``Message``; the outbox keeps it in a row; a broker sends it; what is read from a
stream is a ``StoredMessage``. Whoever needs more beside it, such as an ordering key or the id of
a row, has a subclass, so nothing is copied on the way.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message.

    :param subject: the full NATS subject.
    :param data: the encoded envelope; of others' messages, any bytes.
    :param headers: in the order they are sent; ``Nats-Msg-Id`` among them if it is ours.
    """

    subject: str
    data: bytes
    headers: Mapping[str, str]


class StoredMessage(Message, frozen=True):
    """A message read from a stream without consuming it.

    :param timestamp: when the stream stored it, seconds since the epoch.
    """

    stream: str
    sequence: int
    timestamp: float
