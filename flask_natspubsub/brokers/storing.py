"""Storing for good: an acknowledgement counts only if the stream has *our* message.

A stream drops a message whose ``Nats-Msg-Id`` it has seen within its duplicate window, and says so
with ``duplicate``. Publishers choose the ids: what the stream has under the same id may
be another one's, of another subject, and ours would be lost without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import cast

from ..errors import BrokerError, NotConnected, PublishError, RequestDenied
from ..messages.message import Message, StoredMessage
from .base import Broker, Result, StoredAck

MESSAGE_ID = "Nats-Msg-Id"
#: Which dead letter a message is the replay of; see ``deadletters.reader``.
REPLAY_OF = "x-replay-of"
#: Between an id and what tells the message from the one that had the id before.
_ANOTHER = "#"
#: How long to look for what the stream has under the ids of a batch; seconds.
LOOK_TIMEOUT = 2.0


def store_one(broker: Broker, message: Message, timeout: float) -> StoredAck:
    """Store one message and wait; the error of the publish if that fails."""
    (result,) = _store(broker, [message], timeout)
    result = checked([message], [result], broker, timeout)[0]
    if isinstance(result, PublishError):
        raise result
    return result


def checked(
    messages: Sequence[Message], results: Sequence[Result], broker: Broker, timeout: float
) -> Sequence[Result]:
    """Return the results with those messages stored again whose id another message had.

    Costs nothing unless the stream has called one a duplicate. Where the user may not read
    messages, the acknowledgement is taken as it is.
    """
    doubtful = [
        index
        for index, result in enumerate(results)
        if type(result) is StoredAck and result.duplicate
    ]
    if not doubtful or broker.reads_denied:
        return results
    stolen = _stolen(messages, cast(Sequence[StoredAck], results), doubtful, broker)
    if not stolen:
        return results
    fixed = list(results)
    again = _store(broker, [_under_own_id(messages[index]) for index in stolen], timeout)
    for index, result in zip(stolen, again, strict=True):
        fixed[index] = result
    return fixed


def is_known_as(headers: Mapping[str, str], event_id: str) -> bool:
    """Whether a stored message is the one of ``event_id``, also if it had to take another id."""
    found = headers.get(MESSAGE_ID, "")
    return found == event_id or found.startswith(event_id + _ANOTHER)


def _store(broker: Broker, messages: Sequence[Message], timeout: float) -> list[Result]:
    return broker.submit(messages, timeout).results_within(timeout)


def _stolen(
    messages: Sequence[Message],
    acks: Sequence[StoredAck],
    doubtful: Sequence[int],
    broker: Broker,
) -> list[int]:
    places = [(acks[index].stream, acks[index].sequence) for index in doubtful]
    try:
        found = broker.get_messages(places, LOOK_TIMEOUT)
    except RequestDenied:
        broker.reads_denied = True
        return []
    except (BrokerError, NotConnected):  # slow, or gone, now: the next one is looked at again
        return []
    return [
        index
        for index, stored in zip(doubtful, found, strict=True)
        if stored is not None and not _is_ours(stored, messages[index])
    ]


def _is_ours(stored: StoredMessage, message: Message) -> bool:
    same_replay = stored.headers.get(REPLAY_OF) == message.headers.get(REPLAY_OF)
    return stored.subject == message.subject and same_replay


def _under_own_id(message: Message) -> Message:
    """Return the message under an id that no other subject's message gets; always the same one."""
    whose = f"{message.subject} {message.headers.get(REPLAY_OF, '')}"
    own = hashlib.sha256(whose.encode()).hexdigest()[:16]
    event_id = message.headers.get(MESSAGE_ID, "")
    headers = {**message.headers, MESSAGE_ID: f"{event_id}{_ANOTHER}{own}"}
    return Message(message.subject, message.data, headers)
