"""What the user's session is about to do: whether a row can be committed in it, and is.

A row that is added while the session commits, rolls back or closes is in no transaction; one
whose session ends without a commit is dropped without a word. Both are noticed here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol, cast

import sqlalchemy as sa
from sqlalchemy import event, orm

from ..errors import PublishError

_FLUSHED = "natspubsub_flushed"
_WRITER = "natspubsub_writer"
_PLACES = "natspubsub_places"
_SESSION_MODULE = orm.Session.__module__
#: Functions of SQLAlchemy that end a transaction.
_ENDS = frozenset({"commit", "rollback", "close", "_close_impl"})
#: Packages whose frames are not the place where somebody published.
_PASSED_THROUGH = frozenset(
    {__name__.partition(".")[0], "sqlalchemy", "flask_sqlalchemy", "blinker"}
)


class Writer(Protocol):
    """Whoever has written rows in a session, and hears what became of them."""

    def committed(self, session: orm.Session) -> None:
        """Hear of the commit."""

    def forgotten(self, place: str) -> None:
        """Hear that the session ended without a commit, a rollback or an error.

        :param place: file and line of the first of the lost publishes.
        """


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


# --- rows that wait for a commit


def expect_commit(session: orm.Session, writer: Writer) -> None:
    """Have ``writer`` told what becomes of the rows that were just added to the session."""
    session.info[_WRITER] = writer
    transaction = session.get_nested_transaction() or session.get_transaction()
    places = session.info.setdefault(_PLACES, {})
    if transaction is not None and transaction not in places:
        places[transaction] = _place()


def awaits_commit(session: orm.Session) -> bool:
    """Whether the session's transaction, if it is not just ending, has rows of the outbox."""
    return bool(session.is_active and session.info.get(_PLACES))


def end_of_scope(session: orm.Session) -> None:
    """Take it that nobody will use the session any more: its context has ended."""
    places: dict[object, str] = session.info.pop(_PLACES, None) or {}
    writer: Writer | None = session.info.get(_WRITER)
    for place in list(places.values())[:1]:
        if writer is not None:
            writer.forgotten(place)


def forgive(session: orm.Session) -> None:
    """Take it that the session ends without a commit on purpose, if it does."""
    session.info.pop(_PLACES, None)


def _place() -> str:
    """Return file and line of the caller outside this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _PASSED_THROUGH:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown place"


@event.listens_for(orm.Session, "after_commit")
def _on_commit(session: orm.Session) -> None:
    """Pass it on. A savepoint's release comes here too, and has committed nothing yet."""
    if not session.in_nested_transaction():
        session.info.pop(_PLACES, None)
        writer: Writer | None = session.info.pop(_WRITER, None)
        if writer is not None:
            writer.committed(session)


@event.listens_for(orm.Session, "after_rollback")
def _on_rollback(session: orm.Session) -> None:
    places = session.info.get(_PLACES)
    if places:
        places.pop(session.get_nested_transaction() or session.get_transaction(), None)


@event.listens_for(orm.Session, "after_transaction_end")
def _on_transaction_end(session: orm.Session, transaction: orm.SessionTransaction) -> None:
    places: dict[orm.SessionTransaction, str] = session.info.get(_PLACES) or {}
    place = places.pop(transaction, None)
    if transaction.parent is not None:
        if place is not None:  # the end of a savepoint: its rows are its parent's now
            places.setdefault(transaction.parent, place)
        return
    session.info.pop(_FLUSHED, None)
    session.info.pop(_PLACES, None)
    writer: Writer | None = session.info.pop(_WRITER, None)
    # An error on its way is reason enough for the end; whoever has bound the session to a
    # connection may still commit that.
    meant = sys.exc_info()[0] is not None or isinstance(session.bind, sa.Connection)
    if place is not None and writer is not None and not meant:
        writer.forgotten(place)


# --- what has been flushed: it is in none of the session's collections, and not committed either


@event.listens_for(orm.Session, "after_flush")
def _on_flush(session: orm.Session, context: object) -> None:
    flushed = session.info.setdefault(_FLUSHED, set())
    for objects in (session.new, session.dirty, session.deleted):
        flushed.update(map(type, objects))


def flushed_classes(session: orm.Session) -> set[type]:
    """Return the classes of what was flushed in the session's transaction."""
    found: set[type] = session.info.get(_FLUSHED, set())
    return found


def has_changes(session: orm.Session) -> bool:
    """Whether the session has changes that are neither committed nor being committed."""
    if not session.is_active:
        return False
    pending = flushed_classes(session) or session.new or session.dirty or session.deleted
    return bool(pending) or awaits_commit(session)


# --- transactions as they are meant


def writing_bind(
    session: orm.Session, table: sa.FromClause, mapper: type | None = None
) -> sa.Engine | sa.Connection:
    """Return what a session is bound to when it writes, which may differ from where it reads.

    As SQLAlchemy's docs have it, ``get_bind`` goes by the statement or by ``_flushing``.
    """
    inner = vars(session)
    before = inner.get("_flushing", False)
    inner["_flushing"] = True
    try:
        return session.get_bind(mapper, clause=sa.update(cast(sa.Table, table)))
    finally:
        inner["_flushing"] = before


@contextmanager
def begun(bind: sa.Engine | sa.Connection) -> Iterator[sa.Connection]:
    """Begin on an engine; on a connection whose transaction is a test's, a part of that."""
    if isinstance(bind, sa.Engine):
        with bind.begin() as connection:
            yield connection
    else:
        with bind.begin_nested():
            yield bind


def commits_by_itself(connection: sa.Connection) -> bool:
    """Whether the user has set AUTOCOMMIT, for the connection or for the engine."""
    of_engine = getattr(connection.dialect, "_on_connect_isolation_level", None)
    return "AUTOCOMMIT" in (connection.get_execution_options().get("isolation_level"), of_engine)
