"""The listeners of the user's sessions, and what each does in which order.

A row that is added while the session commits, rolls back or closes is in no transaction; one
whose session ends without a commit is dropped silently. Both are noticed here. What belongs to one
session is in its ``SessionRecord``; what the outbox and the inbox do with it is theirs.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, Protocol
from weakref import WeakSet

import msgspec
import sqlalchemy as sa
from sqlalchemy import event, orm

from ..errors import PublishError

#: Where a session keeps its record.
RECORD = "natspubsub"
#: Set on a connection whose transaction the database may have ended, after an error.
FAILED = "natspubsub_failed"

_SESSION_MODULE = orm.Session.__module__
#: Functions of SQLAlchemy that end a transaction.
_ENDS = frozenset({"commit", "rollback", "close", "_close_impl"})
#: Packages whose frames are not the place where somebody published.
_PASSED_THROUGH = frozenset(
    {__name__.partition(".")[0], "sqlalchemy", "flask_sqlalchemy", "blinker"}
)


class Writer(Protocol):
    """The outbox, as a session knows it that has rows for it."""

    def insert_waiting(self, session: orm.Session) -> None:
        """Insert the rows that were added since the last flush."""

    def committed(self, session: orm.Session, flushed: set[type]) -> None:
        """Note the commit; ``flushed`` are the classes of the rows flushed before it."""

    def forgotten(self, place: str) -> None:
        """Note that the session ended without a commit, a rollback or an error.

        :param place: file and line of the first of the lost publishes.
        """


class Work(Protocol):
    """The handler that works in a session."""

    def on_commit_by_handler(self, session: orm.Session) -> None:
        """Note that the handler commits by itself."""


class Feed(Protocol):
    """Watches models: what a flush is about to do to them, and has done."""

    def look_before(self, session: orm.Session) -> None:
        """Look at a flush that begins."""

    def look(self, session: orm.Session) -> None:
        """Look at a flush that ends."""


#: The feeds there are: a listener cannot be taken away, and must not keep an extension alive.
feeds: WeakSet[Any] = WeakSet()


class SessionRecord(msgspec.Struct, eq=False):
    """What is known of one session.

    ``waiting`` has rows for the next flush; ``writer`` has rows in the transaction, published at
    ``places`` (by the transaction or savepoint that they are in). ``flushed`` are the classes
    of what was flushed: it is in none of the session's collections, and not committed either.
    """

    waiting: Writer | None = None
    writer: Writer | None = None
    places: dict[object, str] = {}
    flushed: set[type] = set()
    work: Work | None = None


def record_of(session: orm.Session) -> SessionRecord:
    """Return the record of a session, made at the first call."""
    record: SessionRecord | None = session.info.get(RECORD)
    if record is None:
        record = session.info[RECORD] = SessionRecord()
    return record


# --- rows that wait for a commit


def require_open(session: orm.Session) -> None:
    """Check that a row added now can be committed.

    :raises PublishError: the session commits, rolls back or closes just now, or was prepared.
    """
    if session.is_active and session.in_transaction():
        return
    if _is_ending(session):
        raise PublishError(
            "The session commits, rolls back or closes just now: a row of the outbox would be in "
            "no transaction.",
            "Publish before the commit, such as in 'before_commit' instead of 'after_commit': the "
            "event is sent if, and only if, the transaction is committed. Or publish with "
            "outbox=False, which sends at once.",
        )
    if not session.is_active and session.in_transaction():
        session.connection()  # SQLAlchemy says what the state is, and what to do


def _is_ending(session: orm.Session) -> bool:
    """Whether the session's own end is among the calls: events that end it come here.

    Nothing public tells: some of them are sent when the old transaction is gone already.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        ends = frame.f_code.co_name in _ENDS
        if ends and frame.f_globals.get("__name__") == _SESSION_MODULE and _is_of(session, frame):
            return True
        frame = frame.f_back
    return False


def _is_of(session: orm.Session, frame: FrameType) -> bool:
    """Whether a method of the session, or of its transaction, is running in the frame."""
    names = frame.f_locals
    owner = names.get("self")
    return any(
        one is session for one in (owner, getattr(owner, "session", None), names.get("sess"))
    )


def expect_commit(session: orm.Session, writer: Writer, *, waiting: bool) -> None:
    """Register ``writer`` for the end of the transaction that has its new rows.

    :param waiting: whether they are inserted by the next flush.
    """
    record = session.info.get(RECORD) or record_of(session)
    record.writer = writer
    if waiting:
        record.waiting = writer
    transaction = session.get_nested_transaction() or session.get_transaction()
    if transaction is not None and transaction not in record.places:
        record.places[transaction] = _place()


def end_of_scope(session: orm.Session) -> None:
    """Report rows without a commit: the session's context has ended."""
    record = record_of(session)
    places, record.places = list(record.places.values()), {}
    if places and record.writer is not None:
        record.writer.forgotten(places[0])


def forgive(session: orm.Session) -> None:
    """Report nothing if the session ends without a commit: it is on purpose."""
    record_of(session).places.clear()


def has_changes(session: orm.Session) -> bool:
    """Whether the session has changes that are neither committed nor being committed."""
    if not session.is_active:
        return False
    record = session.info.get(RECORD)
    flushed = record is not None and (record.flushed or record.places)
    return bool(flushed or session.new or session.dirty or session.deleted)


def _place() -> str:
    """Return file and line of the caller outside this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _PASSED_THROUGH:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown place"


# --- the listeners: they run for every session of the process


@event.listens_for(orm.Session, "before_flush")
def _before_flush(session: orm.Session, context: object, instances: object) -> None:
    """Insert the rows of the outbox that wait, then have the models looked at."""
    record = session.info.get(RECORD)
    if record is not None and record.waiting is not None:
        record.waiting.insert_waiting(session)
        record.waiting = None
    for feed in list(feeds):
        feed.look_before(session)


@event.listens_for(orm.Session, "after_flush")
def _after_flush(session: orm.Session, context: object) -> None:
    """Note the classes of what was flushed, then report the changes of models."""
    record = session.info.get(RECORD) or record_of(session)
    for objects in (session.new, session.dirty, session.deleted):
        record.flushed.update(map(type, objects))
    for feed in list(feeds):
        feed.look(session)


@event.listens_for(orm.Session, "before_commit")
def _before_commit(session: orm.Session) -> None:
    """Notice a handler's own commit; the end of a savepoint is none."""
    record = session.info.get(RECORD)
    work = None if record is None else record.work
    if work is not None and session.get_nested_transaction() is None:
        work.on_commit_by_handler(session)


@event.listens_for(orm.Session, "after_commit")
def _after_commit(session: orm.Session) -> None:
    """Tell the writer. A savepoint's release comes here too, and has committed nothing yet."""
    record = session.info.get(RECORD)
    if record is None or record.writer is None or session.in_nested_transaction():
        return
    writer, record.writer = record.writer, None
    record.places.clear()
    writer.committed(session, record.flushed)


@event.listens_for(orm.Session, "after_rollback")
def _after_rollback(session: orm.Session) -> None:
    record = session.info.get(RECORD)
    if record is not None and record.places:
        record.places.pop(session.get_nested_transaction() or session.get_transaction(), None)


@event.listens_for(orm.Session, "after_transaction_end")
def _after_transaction_end(session: orm.Session, transaction: orm.SessionTransaction) -> None:
    """Pass a savepoint's rows on to its parent; of a transaction, look whether it was forgotten."""
    record = session.info.get(RECORD)
    if record is None:
        return
    place = record.places.pop(transaction, None)
    if transaction.parent is not None:
        if place is not None:  # the end of a savepoint: its rows are its parent's now
            record.places.setdefault(transaction.parent, place)
        return
    writer, record.writer = record.writer, None
    record.places.clear()
    record.flushed.clear()
    # An error on its way is reason enough for the end; a session that is bound to a connection
    # may have its work committed there.
    meant = sys.exc_info()[0] is not None or isinstance(session.bind, sa.Connection)
    if place is not None and writer is not None and not meant:
        writer.forgotten(place)


@event.listens_for(sa.Engine, "handle_error")
def _on_error(context: sa.ExceptionContext) -> None:
    """Note that the database may have ended the transaction."""
    if context.connection is not None and not context.connection.invalidated:
        context.connection.info[FAILED] = True
