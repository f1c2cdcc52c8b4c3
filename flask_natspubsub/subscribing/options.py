"""The options of a subscriber, checked where the subscriber is declared."""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Self

import msgspec

from ..brokers.base import DeliverPolicy
from ..config import parsers
from ..config.table import Row, rows_of
from ..errors import RegistrationError
from ..middleware import Middleware


def _name(value: Any) -> str:
    if not isinstance(value, str) or not re.search(r"[A-Za-z0-9]", value):
        raise ValueError("a text with at least one ASCII letter or digit")
    return value


def _producer(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(rf"\*|{parsers.ONE_NAME}", value):
        raise ValueError("the name of an app (letters, digits, '_' and '-'), or '*' for any app")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a NATS subject such as 'production.billing.invoice.*'")
    return value


def _deliver_policy(value: Any) -> str:
    if value not in ("all", "new", "last"):
        raise ValueError("'all', 'new' or 'last'")
    return str(value)


def _middleware(value: Any) -> tuple[Middleware, ...]:
    functions = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(callable(function) for function in functions):
        raise ValueError("a function (context, call_next), or a list of them")
    return functions


def _stream(value: Any) -> str:
    try:
        return parsers.token(value)
    except ValueError:
        raise ValueError("the name of a stream (letters, digits, '_' and '-')") from None


def _envelope(value: Any) -> Any:
    if not isinstance(value, bool) and not callable(value):
        raise ValueError(
            "True, False (the message is the JSON value or the bytes as they are), or a function "
            "that makes the message of the bytes"
        )
    return value


class SubscriberOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of one subscriber; ``None`` stands for the application's setting.

    :param name: names the subscriber, its durable consumer and its dead letters.
    :param producer: the app whose events are received, ``"*"`` for any; default: this app.
    :param subject: a raw NATS subject, instead of topics.
    :param max_deliver: deliveries after which a message becomes a dead letter.
    :param ack_wait: seconds without a sign of life after which the server redelivers a message.
    :param backoff: seconds before each redelivery of a failed message; the last repeats.
    :param concurrency: messages handled at once by one worker.
    :param timeout: time limit of the handler in seconds.
    :param inbox: whether the handler's database effects happen once.
    :param ordered: one message at a time, in the order of the stream.
    :param deliver_policy: where a new consumer starts: ``"all"``, ``"new"`` or ``"last"``.
    :param dead_letter: whether messages given up on are stored as dead letters.
    :param stream: the stream to receive from, if not the application's.
    :param envelope: False for messages of other systems: the JSON value, or bytes, as they are; a
        function ``(data)`` or ``(data, headers)`` decodes them.
    :param middleware: functions around the handler, the first outermost.
    """

    name: Annotated[str | None, Row(_name)] = None
    producer: Annotated[str | None, Row(_producer)] = None
    subject: Annotated[str | None, Row(_text)] = None
    max_deliver: Annotated[int | None, Row(parsers.integer(1))] = None
    ack_wait: Annotated[float | None, Row(parsers.positive_seconds)] = None
    backoff: Annotated[tuple[float, ...] | None, Row(parsers.backoff)] = None
    concurrency: Annotated[int | None, Row(parsers.integer(1))] = None
    timeout: Annotated[float | None, Row(parsers.positive_seconds)] = None
    inbox: Annotated[bool | None, Row(parsers.boolean)] = None
    ordered: Annotated[bool | None, Row(parsers.boolean)] = None
    deliver_policy: Annotated[DeliverPolicy | None, Row(_deliver_policy)] = None
    dead_letter: Annotated[bool | None, Row(parsers.boolean)] = None
    stream: Annotated[str | None, Row(_stream)] = None
    envelope: Annotated[bool | Callable[..., Any] | None, Row(_envelope)] = None
    middleware: Annotated[tuple[Middleware, ...], Row(_middleware)] = ()

    @classmethod
    def parse(cls, who: str, given: Mapping[str, Any]) -> Self:
        """Check ``given`` and return the options; a value of None counts as not given.

        :param who: the subscriber, for errors.
        :raises RegistrationError: an unknown option or a bad value.
        """
        values = {}
        for option, value in given.items():
            if option not in _TABLE:
                raise _unknown_option(who, option)
            if value is not None:
                values[option] = _parse(who, option, value)
        return cls(**values)

    def with_defaults(self, defaults: Self) -> Self:
        """Return these options; those that are not set come from ``defaults``."""
        missing = [name for name in OPTION_NAMES if getattr(self, name) is None]
        return msgspec.structs.replace(self, **{name: getattr(defaults, name) for name in missing})


#: The name of every option, in order.
OPTION_NAMES: tuple[str, ...] = SubscriberOptions.__struct_fields__
_TABLE = rows_of(SubscriberOptions)


def nearest_option(name: str, cutoff: float = 0.6) -> str | None:
    """Return the option, or ``topics``, that ``name`` probably misspells."""
    near = difflib.get_close_matches(name, ("topics", *OPTION_NAMES), n=1, cutoff=cutoff)
    return near[0] if near else None


def _unknown_option(who: str, option: str) -> RegistrationError:
    near = nearest_option(option)
    fix = f"Did you mean {near!r}?" if near else f"Known options: {', '.join(OPTION_NAMES)}."
    return RegistrationError(f"{who}: unknown option {option!r}.", fix)


def _parse(who: str, option: str, value: Any) -> Any:
    try:
        return _TABLE[option].parse(value)
    except ValueError as error:
        raise RegistrationError(f"{who}: {option} is {value!r}.", f"Allowed: {error}.") from None
