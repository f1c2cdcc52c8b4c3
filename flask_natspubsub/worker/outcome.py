"""What became of a delivery, and the line that the log has of it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from ..messages.ids import short_id
from ..subscribing.tracebacks import of_application, text_of
from ..text import get_logger, printable

_log = get_logger("flask_natspubsub.worker")

Result = Literal["handled", "retried", "discarded", "dead_lettered", "skipped", "timed_out"]

_LINE = "%s %s %s #%d %.1f ms %s%s"
_LEVELS = {"handled": logging.INFO, "skipped": logging.INFO, "dead_lettered": logging.ERROR}


class Outcome(msgspec.Struct, frozen=True):
    """What became of a delivery; one log line's worth.

    :param seconds: from receiving the delivery to its end.
    :param detail: the error or reason, in one line; empty when handled.
    :param subscriber: the name of the subscriber that it was delivered to.
    :param error: what the handler raised, or what was wrong with the message.
    """

    result: Result
    topic: str
    event_id: str
    attempt: int
    seconds: float
    detail: str = ""
    subscriber: str = ""
    error: BaseException | None = None


class OutcomeRecord(logging.LogRecord):
    """The log record of a delivery that went well.

    To make a ``LogRecord`` costs a fifth of what a message may. This one has all that others
    have, but is filled when somebody asks for it: by an attribute, or all of it by ``__dict__``,
    as formatters do. What writes the line of a message needs none of it.
    """

    __slots__ = ("_is_filled", "outcome")  # no fields, which others may write out

    name = _log.name
    levelno = logging.INFO
    levelname = "INFO"
    #: See ``text.get_logger``.
    is_printable = True

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self._is_filled = False
        self.created = time.time()
        self.thread = threading.get_ident()

    def line(self) -> str:
        """Return what ``getMessage`` does, in less time."""
        one = self.outcome
        line = (
            f"{one.topic} {short_id(one.event_id)} {one.subscriber} #{one.attempt} "
            f"{one.seconds * 1000:.1f} ms {one.result}"
        )
        return line if line.isprintable() else printable(line)

    def __getattr__(self, field: str) -> Any:
        """Fill what is asked for and is not there."""
        if field.startswith("__") or self._is_filled:
            raise AttributeError(field, name=field, obj=self)
        self._fill()
        return getattr(self, field)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]  # the same, when it is asked for
        if not self._is_filled:
            self._fill()
        return _fields_of(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be copied and sent on as any other record."""
        return logging.makeLogRecord, (dict(self.__dict__),)

    def _fill(self) -> None:
        outcome, fields = self.outcome, _fields_of(self)
        self._is_filled = True
        record = _record(logging.INFO, outcome)
        kept = dict(fields, msecs=float(int(self.created % 1 * 1000)))
        kept["relativeCreated"] = record.relativeCreated - (record.created - self.created) * 1000
        if self.thread != record.thread:
            names = {one.ident: one.name for one in threading.enumerate()}
            kept["threadName"] = names.get(self.thread)
        fields.update(vars(record))
        fields.update(kept)


#: The attributes that are there, whatever ``__dict__`` does.
_fields_of: Callable[[OutcomeRecord], dict[str, Any]] = vars(logging.LogRecord)["__dict__"].__get__


def report(outcome: Outcome, *, with_traceback: bool = False) -> None:
    """Log an outcome: a line, and the traceback of its error if that is wanted. Never raises."""
    level = logging.ERROR if with_traceback else _LEVELS.get(outcome.result, logging.WARNING)
    if not _log.isEnabledFor(level):
        return
    try:
        if level == logging.INFO and _is_left_alone():
            record: logging.LogRecord = OutcomeRecord(outcome)
        else:
            record = _record(level, outcome)
        if with_traceback and outcome.error is not None:
            with contextlib.suppress(Exception):  # the line is logged in any case
                _add_traceback(record, outcome.error)
        _log.handle(record)
    except Exception:  # noqa: BLE001, S110 - of a log handler that is not ours: the message goes on
        pass


def _is_left_alone() -> bool:
    """Whether nobody makes the records of this logger, or changes them by a filter."""
    return logging.getLogRecordFactory() is logging.LogRecord and len(_log.filters) == 1


def _arguments(outcome: Outcome) -> tuple[object, ...]:
    return (
        printable(outcome.topic),
        printable(short_id(outcome.event_id)),
        outcome.subscriber,
        outcome.attempt,
        outcome.seconds * 1000,
        outcome.result,
        f": {outcome.detail}" if outcome.detail else "",
    )


def _record(level: int, outcome: Outcome) -> logging.LogRecord:
    extra = {
        "event_id": outcome.event_id,
        "result": outcome.result,
        "subscriber": outcome.subscriber,
    }
    arguments, line = _arguments(outcome), report.__code__.co_firstlineno
    return _log.makeRecord(
        _log.name, level, __file__, line, _LINE, arguments, None, "report", extra
    )


def _add_traceback(record: logging.LogRecord, error: BaseException) -> None:
    """Add the traceback, from the application's first frame on.

    Its text is made here: what others have sent can be part of it, and a formatter would let
    that write lines of its own into the log.
    """
    frames = of_application(error)
    record.exc_info = type(error), error, frames
    record.exc_text = text_of(error, frames)
