"""What is remembered of streams, on each kind of database."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa

from flask_natspubsub.brokers.base import StreamConfig, StreamInfo

from .shop import OutboxShop

INFO = StreamInfo(
    config=StreamConfig(name="Main", subjects=("a.>",)),
    last_sequence=7,
    created="2026-01-31T12:00:00Z",
)


def test_a_record_from_the_first_look_to_the_repair(shop: OutboxShop) -> None:
    streams = shop.store.streams
    streams.confirm(INFO, 0.5)
    streams.confirm(INFO, 0.1)
    (record,) = streams.load().values()
    assert (record.name, record.created, record.last_sequence) == ("Main", INFO.created, 7)
    assert streams.rewound() == []

    lower = msgspec.structs.replace(INFO, last_sequence=3)
    assert streams.report("Main", "lower", lower, known=0)
    assert not streams.report("Main", "lower", lower, known=0), "told already"
    (first,) = streams.rewound()
    assert (first.rewinds, first.last_sequence, first.reason) == (1, 3, "lower")
    assert first.sound_until < first.rewound_at < first.sound_until + 60

    streams.confirm(lower, 0.0)
    assert streams.report("Main", "x" * 999, None, known=1)
    (second,) = streams.rewound()
    assert second.sound_until == first.sound_until, "nothing was sound in between"
    assert (second.created, second.last_sequence, len(second.reason)) == ("", 0, 255)
    assert not streams.clear(first), "it was rewound once more"
    assert streams.clear(second)
    assert streams.rewound() == []


def test_a_stream_that_was_never_looked_at(shop: OutboxShop) -> None:
    streams = shop.store.streams
    assert streams.report("Main", "gone", None, known=0)
    assert not streams.report("Main", "gone", None, known=0)
    assert [record.sound_until for record in streams.rewound()] == [0.0]


def test_the_highest_sequence_of_each_stream(shop: OutboxShop) -> None:
    assert shop.store.sent.highest(3) == []
    shop.commit(*range(6))
    shop.relay().run_once()
    table, ids = shop.store.table, [row["id"] for row in shop.rows]
    places = [("Main", 10), ("Other", 5), ("Main", 12), ("Other", 4), ("Main", 11), ("Third", 1)]
    for row_id, (stream, sequence) in zip(ids, places, strict=True):
        values = {"stream": stream, "stream_sequence": sequence}
        shop.execute(sa.update(table).where(table.c.id == row_id).values(values))

    def highest(among: int) -> dict[str, int]:
        return {row.stream: row.sequence for row in shop.store.sent.highest(among)}

    assert highest(6) == {"Main": 12, "Other": 5, "Third": 1}
    assert highest(3) == {"Main": 11, "Other": 4, "Third": 1}, "among those sent last"
    shop.execute(sa.update(table).values(stream=None, stream_sequence=None))
    assert highest(6) == {}, "marked by hand"


def test_sent_rows_newest_first_and_pending_again(shop: OutboxShop) -> None:
    for number in range(25):
        shop.commit(number)
        assert number % 5 or shop.relay().run_once()
    shop.relay().run_once()
    sent = shop.store.sent
    rows = [row for page in sent.pages(size=4) for row in page]
    assert [row.sequence for row in rows] == list(range(25, 0, -1))
    assert sent.highest(3) == rows[:1]
    assert list(sent.pages(stream="another")) == []
    assert sent.count() == 25
    assert sent.count(rows[0].sent_at) == sum(row.sent_at >= rows[0].sent_at for row in rows)

    ids = [row.id for row in rows[:10]]
    sent.confirm(ids)
    assert sum(row["confirmed_at"] is not None for row in shop.rows) == 10
    assert sent.resend(ids) == 10
    assert sent.resend(ids) == 0
    again = [row for row in shop.rows if row["id"] in ids]
    assert all((row["status"], row["stream"], row["confirmed_at"]) == ("pending", None, None)
               for row in again)  # fmt: skip
    assert shop.relay().run_once() == 10
