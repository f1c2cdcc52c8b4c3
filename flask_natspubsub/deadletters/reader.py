"""Reading, replaying and discarding dead letters.

A dead letter is untrusted data: another app, another package or any publisher may have written it.
A record is trusted only as far as its subject proves. By default only the dead letter stream is
read, where an app shares its subjects with nobody. A replay goes only where the writer of the dead
letter could have published itself, or is sent as the original stream still stores it; never to the
server's own subjects.
"""

from __future__ import annotations

import datetime as dt
import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from ..brokers.base import Broker, StoredAck
from ..brokers.storing import store_one
from ..config.settings import Settings
from ..errors import BrokerError, ReplayRefused
from ..messages.identity import place_key
from ..messages.message import Message, StoredMessage
from ..messages.received import read_or_none
from ..messages.subjects import RESERVED_TOPIC, is_subject, matches, normalize_topic, slug, topic_of
from ..subscribing.subscription import Subscription
from .replays import replay_headers
from .shapes import BODY_OMITTED, values_of

UNKNOWN = "?"
#: All apps of the environment.
ANY_APP = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterRecord:
    """A dead letter; ``dead_lettered_at`` is a string as its writer wrote it.

    :param id: its id in ``show``, ``replay`` and ``discard``.
    :param app: the app that gave the message up, by the subject it is stored under.
    :param traceback: the innermost frames of the handler's failure; the last one raised.
    :param stored_at: when the stream stored it; aware, UTC.
    :param data: the original bytes; empty if ``body_omitted``.
    :param shape: the package that wrote it: ``"python"``, ``"javascript"`` or ``"ruby"``.
    """

    id: str
    stream: str
    sequence: int
    app: str
    subscriber: str
    topic: str
    reason: str
    error: str
    deliveries: int
    event_id: str
    trace_id: str | None
    original_subject: str
    original_stream: str
    original_sequence: int | None
    dead_lettered_at: str
    stored_at: dt.datetime
    headers: Mapping[str, str]
    data: bytes
    body_omitted: bool
    shape: str
    traceback: str = ""


class DeadLetters:
    """Reads, replays and discards dead letters, by default those of one app.

    :param subscriptions: returns those of the app; they tell who handles a replay.
    """

    def __init__(
        self,
        broker: Broker,
        settings: Settings,
        subscriptions: Callable[[], Sequence[Subscription]] | None = None,
    ) -> None:
        self._broker = broker
        self._settings = settings
        self._subscriptions = subscriptions
        self._home = ""

    def __iter__(self) -> Iterator[DeadLetterRecord]:
        return self.list()

    def list(
        self,
        *,
        subscriber: str | None = None,
        topic: str | None = None,
        older_than: float | None = None,
        newer_than: float | None = None,
        limit: int | None = None,
        after: str | None = None,
        app: str | None = None,
        peers: bool = False,
    ) -> Iterator[DeadLetterRecord]:
        """Read dead letters, oldest first. The cost of a page does not depend on their number.

        :param topic: a topic, in which ``*`` and ``>`` may stand for tokens.
        :param older_than: only those stored more than ``older_than`` seconds ago.
        :param newer_than: only those stored less than ``newer_than`` seconds ago.
        :param after: only those after the dead letter with this id, the last of the previous
            page; it need not exist any more.
        :param app: those of another app, ``"*"`` for all; default: this app's.
        :param peers: also those that the JavaScript and Ruby packages store among the events,
            where everybody who may publish as the app can write.
        :raises ValueError: ``after`` is not an id.
        """
        pattern = normalize_topic(topic, wildcards=True) if topic else None
        sources = self._sources(app or self._settings.app_name, peers)
        records = (
            record
            for record in map(self._record, self._read(sources, after, older_than, newer_than))
            if (subscriber is None or record.subscriber == subscriber)
            and (pattern is None or _topic_fits(pattern, record))
        )
        return itertools.islice(records, limit)

    def get(self, record_id: str, *, app: str | None = None) -> DeadLetterRecord | None:
        """Read one dead letter; None if there is none with this id.

        :param app: as in ``list``.
        """
        try:
            stream, sequence = self._place(record_id)
        except ValueError:
            return None
        if stream not in (self._letters_stream(), self._settings.stream):
            return None
        stored = self._broker.get_message(stream, sequence)
        if stored is None or self._app_of(stored) is None:
            return None
        record = self._record(stored)
        return record if app == ANY_APP or record.app == (app or self._settings.app_name) else None

    def replay(
        self, record: DeadLetterRecord, *, force: bool = False, to: str | None = None
    ) -> StoredAck:
        """Send the message again, only to the subscriber that failed, and delete the dead letter.

        The message keeps its event id. Other subscribers skip it.

        :param force: handle it even if the inbox says that it was handled before.
        :param to: the name of another subscriber of the same app, such as a renamed one.
        :raises ReplayRefused: no subscriber would handle it, or its subject is not allowed.
        :raises PublishError: it could not be stored; the dead letter stays.
        :raises BrokerError: the body was left out and is no longer in the original stream.
        """
        addressee = self._addressee(record, to)
        original = self._original(record)
        letter = place_key(record.stream, record.sequence, record.stored_at.timestamp())
        headers = replay_headers(
            original.headers,
            # The sequence distinguishes it from other subscribers' dead letters of the event.
            message_id=f"{record.event_id}:replay:{record.sequence}",
            letter=letter,
            addressee=addressee,
            force=force,
        )
        message = Message(record.original_subject, original.data, headers)
        ack = store_one(self._broker, message, self._settings.publish_timeout)
        self.discard(record)
        return ack

    def discard(self, record: DeadLetterRecord) -> bool:
        """Delete a dead letter for good; False if it was gone."""
        return self._broker.delete_message(record.stream, record.sequence)

    def body(self, record: DeadLetterRecord) -> bytes:
        """Return the original bytes, from the original stream if they were left out.

        :raises BrokerError: they are no longer there.
        """
        return self._stored_original(record).data if record.body_omitted else record.data

    # --- where a replay may go

    def _addressee(self, record: DeadLetterRecord, to: str | None) -> tuple[str, str] | None:
        """Return the app and the subscriber that a replay is for; None: all that receive it.

        :raises ReplayRefused: there is no such subscriber, or it would not receive it.
        """
        name = to or record.subscriber
        if name == UNKNOWN:
            return None
        if record.shape != "python" and to is None:
            return record.app, name  # of another package, which knows its own subscribers
        wanted = self._wanted_by(record.app, name)
        if wanted is None:
            raise ReplayRefused(
                f"The app {record.app!r} has no subscriber {name!r}, so nobody would handle the "
                f"dead letter {record.id}.",
                f"Say who shall: --to NAME, or replay(to=...).{self._known(record.app)}",
            )
        if not any(matches(pattern, record.original_subject) for pattern in wanted):
            raise ReplayRefused(
                f"The subscriber {name!r} of the app {record.app!r} does not receive "
                f"{record.original_subject!r}, so nobody would handle the dead letter "
                f"{record.id}.",
                "Add the topic to it, or say who shall handle it: --to NAME.",
            )
        return record.app, name

    def _wanted_by(self, app: str, name: str) -> Sequence[str] | None:
        """Return the subjects that a subscriber receives; None if there is no such subscriber."""
        pulled_only = False
        if app == self._settings.app_name:
            if self._subscriptions is None:
                return (">",)  # nobody can say
            declared = {one.token: one.filter_subjects for one in self._subscriptions()}
            if slug(name) in declared:
                return declared[slug(name)]
            pulled_only = bool(declared)  # the code knows: only a worker that runs knows better
        durable = f"{app}-{slug(name)}"
        info = self._broker.consumer_info(self._settings.stream, durable)
        gone = info is None or (pulled_only and not info.waiting)
        return None if info is None or gone else info.filter_subjects

    def _known(self, app: str) -> str:
        if app != self._settings.app_name or self._subscriptions is None:
            return ""
        names = ", ".join(one.name for one in self._subscriptions())
        return f" It has {names}." if names else ""

    def _original(self, record: DeadLetterRecord) -> DeadLetterRecord | StoredMessage:
        """Return what has the body and the headers to send.

        The letter's own, if its app publishes to that subject; else what is stored there: then a
        replay says nothing that the other app has not said.

        :raises ReplayRefused: the subject is not for messages of apps, or what is stored there
            is another message.
        """
        subject = record.original_subject
        own = subject.startswith(f"{self._settings.env}.{record.app}.")
        if not self._may_be_sent_to(subject):
            raise ReplayRefused(
                f"The dead letter {record.id} asks to be sent to {subject!r}, where no event goes.",
                "Somebody may have forged it: look at it with 'dlq show', and discard it.",
            )
        if own and not record.body_omitted:
            return record
        stored = self._stored_original(record)
        known = read_or_none(msgspec.structs.replace(stored, subject=subject))
        other = record.body_omitted and known is not None and known.event_id != record.event_id
        if other or not (record.body_omitted or stored.data == record.data):
            raise ReplayRefused(
                f"The dead letter {record.id} is not the message that {record.original_stream!r} "
                f"has as its number {record.original_sequence}.",
                "Have the app that published it publish it again.",
            )
        return stored

    def _may_be_sent_to(self, subject: str) -> bool:
        env, *rest = subject.split(".")
        is_event = env == self._settings.env and len(rest) > 1 and RESERVED_TOPIC not in rest[:2]
        if env != self._settings.env and self._subscriptions is not None:
            # A raw subject, of a stream that others fill; the server's own begin with $ or _.
            filters = [one for each in self._subscriptions() for one in each.filter_subjects]
            is_event = env[:1] not in ("$", "_") and any(matches(one, subject) for one in filters)
        return is_subject(subject) and is_event

    def _stored_original(self, record: DeadLetterRecord) -> StoredMessage:
        """Return the original from a stream that the app receives from.

        :raises BrokerError: the stream does not have it any more.
        """
        stored = None
        stream = record.original_stream
        if record.original_sequence and stream in self._streams():
            stored = self._broker.get_message(stream, record.original_sequence)
        if stored is None or stored.subject != record.original_subject:
            why = "too large to be kept with it" if record.body_omitted else "another app's"
            raise BrokerError(
                f"The body of dead letter {record.id} was {why}, and the original is no longer in "
                f"{stream!r}.",
                "Have the app that published it publish it again, and discard this one.",
            )
        return stored

    def _streams(self) -> set[str]:
        """Return the streams that the app receives from."""
        main = self._settings.stream
        configs = [one.consumer_config(main) for one in (self._subscriptions or list)()]
        return {main, *(self._broker.place(config).stream for config in configs)}

    # --- streams and subjects

    def _letters_stream(self) -> str:
        """Return the stream of the dead letters; with a peer's set-up, the main stream."""
        if not self._home:
            own = self._settings.dead_letter_stream
            self._home = own if self._broker.stream_info(own) else self._settings.stream
        return self._home

    def _sources(self, app: str, peers: bool) -> dict[str, tuple[str, ...]]:
        """Return the streams that store dead letters of ``app``, with the subjects in each."""
        env, main = self._settings.env, self._settings.stream
        whose = (f"{env}.dlq.{app}", f"{env}.dlq.{app}.>") if app != ANY_APP else (f"{env}.dlq.>",)
        sources: dict[str, tuple[str, ...]] = {self._letters_stream(): whose}
        if peers:
            sources[main] = (*sources.get(main, ()), f"{env}.{app}.{RESERVED_TOPIC}")
        return sources

    def _app_of(self, stored: StoredMessage) -> str | None:
        """Return the app of a dead letter, by its subject; None if it is not a dead letter."""
        tokens = stored.subject.split(".")
        if tokens[0] != self._settings.env or len(tokens) < 3:
            return None
        if tokens[1] == RESERVED_TOPIC and stored.stream == self._letters_stream():
            return tokens[2] if len(tokens) <= 4 else None
        of_peer = len(tokens) == 3 and tokens[2] == RESERVED_TOPIC
        return tokens[1] if of_peer and stored.stream == self._settings.stream else None

    def _place(self, record_id: str) -> tuple[str, int]:
        """Return the stream and the sequence of an id."""
        stream, _, sequence = checked_id(record_id).rpartition(":")
        return stream or self._settings.dead_letter_stream, int(sequence)

    def _read(
        self,
        sources: Mapping[str, Sequence[str]],
        after: str | None,
        older_than: float | None,
        newer_than: float | None,
    ) -> Iterator[StoredMessage]:
        """Read stored messages, one stream after the other."""
        now, todo = self._broker.now(), dict(sources)
        last_stream, last = self._place(after) if after is not None else ("", 0)
        if last_stream == self._settings.stream and len(todo) > 1:
            del todo[self._letters_stream()]
        for stream, subjects in todo.items():
            start = last if stream == last_stream else 0
            if newer_than is not None:
                start = max(start, self._last_before(stream, now - newer_than))
            for stored in self._merged(stream, subjects, start):
                if older_than is not None and now - stored.timestamp <= older_than:
                    break  # and so is all that follows
                if self._app_of(stored) is not None:
                    yield stored

    def _merged(self, stream: str, subjects: Sequence[str], after: int) -> Iterator[StoredMessage]:
        """Read several subjects of a stream in the order of the stream."""
        found = [self._broker.messages(stream, subject, after=after) for subject in subjects]
        return heapq.merge(*found, key=lambda stored: stored.sequence)

    def _last_before(self, stream: str, time: float) -> int:
        """Return the last sequence stored before ``time``, by binary search."""
        info = self._broker.stream_info(stream)
        if info is None:
            return 0
        low, high = info.first_sequence - 1, info.last_sequence
        while low < high:
            middle = (low + high) // 2
            found = next(iter(self._broker.messages(stream, after=middle)), None)
            if found is None or found.timestamp >= time:
                high = middle
            else:
                low = found.sequence
        return low

    def _record(self, stored: StoredMessage) -> DeadLetterRecord:
        own = stored.stream == self._settings.dead_letter_stream
        record_id = str(stored.sequence) if own else f"{stored.stream}:{stored.sequence}"
        values = values_of(stored)
        original_subject = str(values.get("original_subject") or stored.subject)
        data = values["data"]
        known = read_or_none(msgspec.structs.replace(stored, subject=original_subject, data=data))
        sequence = str(values.get("original_sequence") or "")
        return DeadLetterRecord(
            id=record_id,
            stream=stored.stream,
            sequence=stored.sequence,
            app=self._app_of(stored) or UNKNOWN,
            subscriber=_subscriber(stored, values.get("subscriber")),
            topic=known.topic if known else topic_of(original_subject),
            reason=str(values.get("reason") or UNKNOWN),
            error=str(values.get("error") or ""),
            traceback=str(values.get("traceback") or ""),
            deliveries=int(values.get("deliveries") or 0),
            event_id=str(values.get("event_id") or (known.event_id if known else "")),
            trace_id=str(values.get("trace_id") or (known and known.trace_id) or "") or None,
            original_subject=original_subject,
            original_stream=str(values.get("original_stream") or self._settings.stream),
            original_sequence=_sequence(sequence),
            dead_lettered_at=str(values.get("at") or ""),
            stored_at=dt.datetime.fromtimestamp(stored.timestamp, dt.UTC),
            headers=stored.headers,
            data=data,
            body_omitted=BODY_OMITTED in stored.headers,
            shape=values["shape"],
        )


def _subscriber(stored: StoredMessage, told: object) -> str:
    """Return the subscriber: the header's name if it fits the subject, else the subject's token."""
    tokens, name = stored.subject.split("."), str(told or UNKNOWN)
    if len(tokens) == 4 and slug(name) != tokens[3]:
        return tokens[3]
    return name


def _sequence(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def checked_id(record_id: str) -> str:
    """Return the id of a dead letter unchanged; ValueError for anything else."""
    sequence = record_id.rpartition(":")[2]
    if not (sequence.isascii() and sequence.isdigit() and len(sequence) < 20):
        raise ValueError(f"{record_id!r} is not the id of a dead letter")
    return record_id


def _topic_fits(pattern: str, record: DeadLetterRecord) -> bool:
    return matches(pattern, record.topic) or matches(pattern, topic_of(record.original_subject))
