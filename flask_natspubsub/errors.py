"""Every error the extension raises.

::

    NatsPubsubError
    ├── ConfigurationError        a NATSPUBSUB_* value, or a missing extra
    ├── RegistrationError         a subscriber that cannot work as declared
    ├── InvalidTopic              a topic or subject that NATS cannot address
    ├── TopologyError             streams on the server that conflict with ours
    ├── ReplayRefused             a dead letter that may not be sent to its subject
    ├── DecodingError             bytes that are not one of our messages
    ├── BrokerError               a call to the broker that failed
    │   └── RequestDenied         a call that this user may not make
    ├── DatabaseError             a transaction of the extension's own that failed
    │   ├── TablesMissing         the outbox and inbox tables have not been created
    │   └── InboxBusy             another delivery of the message has not ended
    ├── HandlerTimeout            a handler that ran longer than its time limit
    ├── HandlerInterrupted        a handler stopped because another one blocked the loop
    ├── NeverFinished             a message whose handling killed the process too often
    └── PublishError              a message that was not (provably) stored
        ├── EncodingError         the message has no JSON form
        ├── PayloadTooLarge       more bytes than the server accepts
        ├── NotASubject           an invalid subject
        ├── NoStreamForSubject    no stream stores this subject
        ├── PublishDenied         the server refuses this user or this message
        ├── NotConnected          no server could be reached within the timeout
        └── CircuitOpen           too many failures in a row; this one was not tried

``HandlerVerdict``, with ``Retry``, ``Discard`` and ``DeadLetter``, is not part of this tree:
a handler raises it to decide what happens to its message, which is not a failure.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from .text import printable

#: The outcome of a failed publish: the message is not stored, or it may be.
Outcome = Literal["not_sent", "unknown"]


class NatsPubsubError(Exception):
    """Base of all errors of this package.

    Its text is one printable line, because it may quote what others have sent.

    :param message: what happened.
    :param fix: what the reader can do about it.
    """

    #: Stable name of the error, an anchor in the troubleshooting page.
    code: ClassVar[str] = "error"

    def __init__(self, message: str, fix: str = "") -> None:
        self.message = printable(message)
        self.fix = printable(fix)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} {self.fix}".rstrip()


class ConfigurationError(NatsPubsubError):
    """A setting has an invalid value, or an extra is missing; raised by ``init_app``."""

    code = "configuration"


class RegistrationError(NatsPubsubError):
    """A subscriber cannot work as declared (duplicate name, bad annotation, bad option)."""

    code = "registration"


class InvalidTopic(NatsPubsubError, ValueError):
    """A topic is empty, has an empty token, or a wildcard where none is allowed."""

    code = "invalid-topic"


class ReplayRefused(NatsPubsubError):
    """A dead letter may not be sent to its subject; it stays in its stream."""

    code = "replay-refused"


class TopologyError(NatsPubsubError):
    """The streams on the server conflict with what the application needs."""

    code = "topology"


class DecodingError(NatsPubsubError, ValueError):
    """Received bytes are not a message.

    :param reason: ``"malformed"`` (not an envelope) or ``"schema"`` (the message does
        not fit the handler's type); ``x-dlq-reason`` of the dead letter.
    """

    code = "decoding"

    def __init__(
        self, message: str, fix: str = "", *, reason: Literal["malformed", "schema"] = "malformed"
    ) -> None:
        super().__init__(message, fix)
        self.reason = reason


class BrokerError(NatsPubsubError):
    """A call to the broker other than a publish failed or timed out."""

    code = "broker"


class RequestDenied(BrokerError):
    """The server does not let this user send such a request."""

    code = "request-denied"


class DatabaseError(NatsPubsubError):
    """The database failed in a transaction of the relay, an inbox or a command."""

    code = "database"


class TablesMissing(DatabaseError):
    """The tables of the outbox and the inbox are not in the database."""

    code = "tables-missing"


class HandlerTimeout(NatsPubsubError):
    """A handler ran longer than its time limit; the message is delivered again."""

    code = "handler-timeout"


class HandlerInterrupted(NatsPubsubError):
    """A handler was stopped because another one blocked their event loop.

    The message is delivered again; the interrupted delivery does not count.
    """

    code = "handler-interrupted"


class InboxBusy(DatabaseError):
    """Another delivery of the message is still being handled; this one does not count."""

    code = "inbox-busy"


class NeverFinished(NatsPubsubError):
    """A message was delivered too often and no handler ended, because the process died."""

    code = "never-finished"


class PublishError(NatsPubsubError):
    """A message was not stored, or it is unknown whether it was.

    :param outcome: ``"not_sent"``: it was not sent, or the server refused it; ``"unknown"``:
        it was sent and no answer came in time. Sending it again with the same ``event_id`` is
        safe within the stream's duplicate window.
    """

    code = "publish"

    #: Whether publishing the same message again later may succeed.
    temporary: ClassVar[bool] = True

    def __init__(self, message: str, fix: str = "", *, outcome: Outcome = "not_sent") -> None:
        super().__init__(message, fix)
        self.outcome: Outcome = outcome


class EncodingError(PublishError, ValueError):
    """A message, or a part of it, has no JSON form.

    :param path: the path of the bad value, such as ``$.items[2].price``.
    """

    code = "encoding"
    temporary = False

    def __init__(self, message: str, fix: str = "", *, path: str = "$") -> None:
        super().__init__(message, fix)
        self.path = path


class PayloadTooLarge(PublishError):
    """Payload and headers exceed the server's ``max_payload``.

    :param size: bytes of payload and headers together.
    :param limit: bytes that the server accepts.
    """

    code = "payload-too-large"
    temporary = False

    def __init__(self, message: str, fix: str = "", *, size: int = 0, limit: int = 0) -> None:
        super().__init__(message, fix)
        self.size = size
        self.limit = limit

    @classmethod
    def of(cls, name: str, size: int, limit: int) -> PayloadTooLarge:
        """Make the error for a message of ``size`` bytes.

        :param name: its topic or subject.
        """
        return cls(
            f"The message for {name!r} has {size:,} bytes with its headers; "
            f"the server takes {limit:,}.",
            "Publish a reference to the data instead, or raise max_payload on the server.",
            size=size,
            limit=limit,
        )


class NoStreamForSubject(PublishError):
    """No JetStream stream stores the subject."""

    code = "no-stream"
    temporary = False


class PublishDenied(PublishError):
    """The server refused the message because of permissions or a limit of the stream."""

    code = "publish-denied"
    temporary = False


class NotASubject(PublishError, ValueError):
    """A message was addressed to an invalid subject; nothing was sent."""

    code = "not-a-subject"
    temporary = False


class NotConnected(PublishError):
    """No connection to NATS could be made within the timeout."""

    code = "not-connected"

    def __init__(
        self,
        message: str,
        fix: str = "Check that the server runs, NATSPUBSUB_URLS and the credentials.",
        *,
        outcome: Outcome = "not_sent",
    ) -> None:
        super().__init__(message, fix, outcome=outcome)


class CircuitOpen(PublishError):
    """Publishing failed too often in a row and is suspended for a while."""

    code = "circuit-open"


class HandlerVerdict(Exception):
    """Base of the exceptions by which a handler decides what happens to its message."""


class Retry(HandlerVerdict):
    """Deliver this message again later.

    :param delay: seconds until the next delivery; default: the subscriber's backoff.
    """

    def __init__(self, delay: float | None = None, reason: str = "") -> None:
        super().__init__(reason or "retry requested")
        self.delay = delay


class Discard(HandlerVerdict):
    """Drop this message: it is counted and logged, and not kept."""

    def __init__(self, reason: str = "discarded by the handler") -> None:
        super().__init__(reason)


class DeadLetter(HandlerVerdict):
    """Give this message up now, and keep it in the dead letter stream."""

    def __init__(self, reason: str = "rejected by the handler") -> None:
        super().__init__(reason)
