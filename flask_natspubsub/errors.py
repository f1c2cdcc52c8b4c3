"""Every error the extension raises.

::

    NatsPubsubError
    ├── ConfigurationError        a NATSPUBSUB_* value, or a missing extra
    ├── RegistrationError         a subscriber that cannot work as declared
    ├── InvalidTopic              a topic or subject that NATS cannot address
    ├── TopologyError             streams on the server that stand in the way
    ├── ReplayRefused             a dead letter that may not go where it asks to
    ├── DecodingError             bytes that are not one of our messages
    ├── BrokerError               a call to the broker that failed
    │   └── RequestDenied         a call that this user may not make
    ├── DatabaseError             a transaction of the extension's own that failed
    │   ├── TablesMissing         the outbox and inbox tables have not been created
    │   └── InboxBusy             another delivery of the message has not ended
    ├── HandlerTimeout            a handler that ran longer than its time limit
    ├── HandlerInterrupted        a handler given up on account of another's
    ├── NeverFinished             a message during which the process died too often
    └── PublishError              a message that was not (provably) stored
        ├── EncodingError         the message has no JSON form
        ├── PayloadTooLarge       more bytes than the server takes
        ├── NotASubject           no message can be sent to this
        ├── NoStreamForSubject    no stream stores this subject
        ├── PublishDenied         the server refuses this user or this message
        ├── NotConnected          no server within the time allowed
        └── CircuitOpen           too many failures in a row; not even tried

What a handler may raise to say how its message ends stands apart, since it is no
failure: ``HandlerVerdict`` with ``Retry``, ``Discard`` and ``DeadLetter``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from .text import printable

#: What is known of a failed publish: it never left, or nobody can say.
Outcome = Literal["not_sent", "unknown"]


class NatsPubsubError(Exception):
    """Base of all errors of this package.

    Its text is printable, in one line: what others have sent may be quoted in it.

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
    """A setting has a value that cannot work; raised by ``init_app``."""

    code = "configuration"


class RegistrationError(NatsPubsubError):
    """A subscriber cannot work as declared (duplicate name, bad annotation, bad option)."""

    code = "registration"


class InvalidTopic(NatsPubsubError, ValueError):
    """A topic is empty, has an empty token, or a wildcard where none is allowed."""

    code = "invalid-topic"


class ReplayRefused(NatsPubsubError):
    """A dead letter asks to be sent where nobody may send it; it stays."""

    code = "replay-refused"


class TopologyError(NatsPubsubError):
    """The streams on the server do not allow what the application needs."""

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
    """A handler was given up on account of another's; the message is delivered again.

    That delivery does not count against the message.
    """

    code = "handler-interrupted"


class InboxBusy(DatabaseError):
    """Another delivery of the message has not ended; this one does not count."""

    code = "inbox-busy"


class NeverFinished(NatsPubsubError):
    """A message was delivered too often without any handler ending: the process died."""

    code = "never-finished"


class PublishError(NatsPubsubError):
    """A message was not stored, or nobody can say whether it was.

    :param outcome: ``"not_sent"``: it never left this process or the server refused it;
        ``"unknown"``: it was sent and no answer came in time. Sending again with the same
        ``event_id`` is safe within the stream's duplicate window.
    """

    code = "publish"

    #: Whether the same message may be stored if it is published again later.
    temporary: ClassVar[bool] = True

    def __init__(self, message: str, fix: str = "", *, outcome: Outcome = "not_sent") -> None:
        super().__init__(message, fix)
        self.outcome: Outcome = outcome


class EncodingError(PublishError, ValueError):
    """A message, or a part of it, has no JSON form.

    :param path: where, as in ``$.items[2].price``.
    """

    code = "encoding"
    temporary = False

    def __init__(self, message: str, fix: str = "", *, path: str = "$") -> None:
        super().__init__(message, fix)
        self.path = path


class PayloadTooLarge(PublishError):
    """Payload and headers exceed the server's ``max_payload``.

    :param size: bytes of payload and headers together.
    :param limit: bytes the server takes.
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
    """The server refused the message: permissions, or a limit of the stream."""

    code = "publish-denied"
    temporary = False


class NotASubject(PublishError, ValueError):
    """A message was to be sent to what is no subject; nothing was sent."""

    code = "not-a-subject"
    temporary = False


class NotConnected(PublishError):
    """No connection to NATS could be had within the time allowed."""

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
    """Publishing failed too often in a row and is suspended for a moment."""

    code = "circuit-open"


class HandlerVerdict(Exception):
    """What a handler says about its message by raising; see the three below."""


class Retry(HandlerVerdict):
    """Deliver this message again later.

    :param delay: seconds until then; ``None`` for the subscriber's backoff.
    """

    def __init__(self, delay: float | None = None, reason: str = "") -> None:
        super().__init__(reason or "retry requested")
        self.delay = delay


class Discard(HandlerVerdict):
    """Drop this message: it is settled, counted and logged, and not kept anywhere."""

    def __init__(self, reason: str = "discarded by the handler") -> None:
        super().__init__(reason)


class DeadLetter(HandlerVerdict):
    """Give this message up now: keep it in the dead letter stream."""

    def __init__(self, reason: str = "rejected by the handler") -> None:
        super().__init__(reason)
