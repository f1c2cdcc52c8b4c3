"""A stream that goes back on what it acknowledged: noticed, told, repaired. On a real server."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flask_natspubsub import ConfigurationError
from flask_natspubsub.brokers.base import ConsumerConfig, StoredAck
from flask_natspubsub.brokers.jetstream.consumer_api import (
    CONSUMER_NOT_FOUND,
    Floor,
    Standing,
)
from flask_natspubsub.brokers.jetstream.stream_api import JetStreamApi
from flask_natspubsub.cli import natspubsub
from flask_natspubsub.outbox import verification
from flask_natspubsub.outbox.housekeeping import Timing
from flask_natspubsub.outbox.rewind import StreamWatch
from flask_natspubsub.outbox.verification import SentEvents
from tests.conftest import MakePubsub
from tests.integration.helpers import api
from tests.support.servers import NatsServer
from tests.support.waiting import eventually, for_seconds

from .conftest import MakeShop
from .shop import OutboxShop

pytestmark = pytest.mark.real_server


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    """A server of this file's own: its disk is gone back in time."""
    with NatsServer() as running:
        yield running


@pytest.fixture
def shop(make_shop: MakeShop, sqlite: str, server: NatsServer) -> OutboxShop:
    return make_shop(sqlite, urls=server.url, outbox_poll_interval=0.1)


def events(shop: OutboxShop) -> SentEvents:
    return shop.pubsub.sent_events


def rewound(shop: OutboxShop) -> list[str]:
    return [record.name for record in shop.store.streams.rewound()]


def send(shop: OutboxShop, *numbers: int) -> None:
    shop.commit(*numbers)
    assert shop.relay().run_once() == len(numbers)


@contextmanager
def loses_what_is_sent(shop: OutboxShop, server: NatsServer) -> Iterator[None]:
    """Put the server's disk back, at the end, to what it is now."""
    data, copy = server.folder / "data", server.folder / "copy"
    server.stop()
    shutil.copytree(data, copy)
    server.start()
    shop.broker.connect(30)
    try:
        yield
    finally:  # the server is that of other tests, too
        server.kill()
        shutil.rmtree(data)
        copy.rename(data)
        server.start()
    shop.broker.connect(30)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]


# --- noticed


def test_nothing_is_noticed_where_nothing_is_lost(
    shop: OutboxShop, server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    for start in range(0, 30, 10):
        send(shop, *range(start, start + 10))
    server.kill()
    server.start()
    shop.broker.connect(30)
    send(shop, 30)

    assert rewound(shop) == errors(caplog) == []
    found = events(shop).verify(full=True)
    assert (found.rows, found.checked, found.present, found.missing) == (31, 31, 31, [])
    assert all(row["confirmed_at"] for row in shop.rows)


def test_a_lower_last_sequence_is_noticed_by_the_next_relay_and_repaired_on_request(
    shop: OutboxShop, server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    send(shop, *range(10))
    with loses_what_is_sent(shop, server):
        send(shop, *range(10, 15))

    assert shop.relay().run_once() == 0
    (error,) = errors(caplog)
    assert "its last message is number 10, and 15 had been given" in error
    assert "outbox resend --missing-only" in error
    assert rewound(shop) == [shop.state.settings.stream]
    assert shop.relay().run_once() == 0
    assert len(errors(caplog)) == 1, "it is told once"

    ids = {row["event_id"] for row in shop.rows[10:]}
    assert set(events(shop).verify().missing) == ids
    assert events(shop).resend(missing_only=True, dry_run=True) == 5
    assert rewound(shop)
    assert events(shop).resend(missing_only=True) == 5
    assert rewound(shop) == []
    assert shop.relay().run_once() == 5
    assert shop.sent == list(range(15))
    assert {row["event_id"] for row in shop.rows[10:]} == ids


def test_a_relay_notices_by_the_acknowledgement_and_has_it_sent_again(
    make_shop: MakeShop,
    sqlite: str,
    server: NatsServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shop = make_shop(
        sqlite, urls=server.url, outbox_poll_interval=0.1, outbox_resend_on_rewind=True
    )
    send(shop, *range(10))
    relay = shop.start_relay()
    with loses_what_is_sent(shop, server):
        shop.commit(*range(10, 20))
        shop.wait_until_marked()
        relay.housekeeping.timing = Timing(check=3600.0)
    shop.commit(20)

    eventually(lambda: set(shop.sent) == set(range(21)), 60, "not all was sent again")
    eventually(lambda: not rewound(shop), 60, "it is still reported")
    assert len(errors(caplog)) == 1
    again = [number for number in shop.sent if 10 <= number < 20]
    assert again == sorted(again), "in the order of before"
    assert events(shop).verify(full=True).missing == []


def test_a_gap_that_others_have_filled_is_noticed(shop: OutboxShop, server: NatsServer) -> None:
    send(shop, *range(10))
    with loses_what_is_sent(shop, server):
        send(shop, *range(10, 15))
    for number in range(100, 120):
        with shop.app.app_context():
            shop.publish(number, outbox=False)

    assert shop.relay().run_once() == 0
    (record,) = shop.store.streams.rewound()
    assert record.reason == "its message number 15 is not the one that was acknowledged"
    assert events(shop).resend(missing_only=True) == 5


def test_a_stream_made_anew_is_noticed(shop: OutboxShop, server: NatsServer) -> None:
    stream = shop.state.settings.stream
    send(shop, *range(10))
    api(server.url, f"STREAM.DELETE.{stream}")
    shop.broker.setup(shop.state.streams())
    with shop.app.app_context():
        for number in range(100, 120):
            shop.publish(number, outbox=False)

    assert shop.relay().run_once() == 0
    (record,) = shop.store.streams.rewound()
    assert record.reason.startswith("it was created anew")
    assert events(shop).resend(missing_only=True) == 10
    assert shop.relay().run_once() == 10
    assert set(shop.sent) == {*range(10), *range(100, 120)}


def test_a_stream_that_is_gone_is_repaired_when_it_is_back(
    make_shop: MakeShop, sqlite: str, server: NatsServer
) -> None:
    shop = make_shop(
        sqlite, urls=server.url, outbox_poll_interval=0.1, outbox_resend_on_rewind=True
    )
    send(shop, *range(10))
    relay = shop.relay()
    relay.housekeeping.timing = Timing(check=0.1)
    shop.start_relay(relay)
    api(server.url, f"STREAM.DELETE.{shop.state.settings.stream}")
    eventually(lambda: rewound(shop), 60, "it is not noticed")
    assert shop.store.counts()["sent"] == 10, "there is nothing to send it to yet"
    with shop.counting() as statements:
        for_seconds(1, lambda: None)
        assert len(statements) < 200, "the relay does not spin while it waits for the stream"
    shop.broker.setup(shop.state.streams())

    shop.wait_for_sent(10, 60)
    eventually(lambda: not rewound(shop), 60, "it is still reported")
    assert set(shop.sent) == set(range(10))


def test_of_several_relays_one_tells(
    make_shop: MakeShop, sqlite: str, server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    shop = make_shop(sqlite, urls=server.url)
    send(shop, *range(10))
    watches = [StreamWatch(shop.store, shop.broker) for _ in range(3)]
    for watch in watches:
        watch.load()
    stream = shop.state.settings.stream
    for watch in watches:
        watch.note([("another", StoredAck(stream, 4))])
        watch.report()
        watch.check()

    (record,) = shop.store.streams.rewound()
    assert (record.rewinds, len(errors(caplog))) == (1, 1)


def test_a_second_copy_is_no_rewind(shop: OutboxShop) -> None:
    send(shop, *range(3))
    watch = StreamWatch(shop.store, shop.broker)
    watch.load()
    watch.note([("x", StoredAck(shop.state.settings.stream, 1, duplicate=True))])
    watch.check()
    assert rewound(shop) == []


@pytest.mark.parametrize(("last", "start"), [(20, 14), (13, 14), (12, None)])
def test_a_consumer_made_anew_leaves_out_none_of_the_numbers_given_again(
    last: int, start: int | None
) -> None:
    """It goes on where the one before was, unless the stream has not even come that far."""
    made: list[dict[str, Any]] = []

    async def request(subject: str, payload: bytes) -> bytes:
        if ".STREAM.INFO." in subject:
            state = {"last_seq": last}
            return json.dumps(
                {"config": {"subjects": ["a.>"]}, "created": "then", "state": state}
            ).encode()
        if ".CONSUMER.INFO." in subject:
            return json.dumps({"error": {"err_code": CONSUMER_NOT_FOUND}}).encode()
        made.append(json.loads(payload)["config"])
        return b"{}"

    config = ConsumerConfig(stream="main", durable="reader", filter_subjects=("a.b",))
    asyncio.run(JetStreamApi(request).ensure_consumer(config, Standing(Floor("then", 13))))
    assert made[0].get("opt_start_seq") == start


# --- told and repaired


def test_while_it_is_not_repaired_sent_rows_are_kept_and_health_says_so(
    make_shop: MakeShop, sqlite: str, server: NatsServer
) -> None:
    shop = make_shop(
        sqlite, urls=server.url, outbox_retention=0, health_url_prefix="/health",
        outbox_poll_interval=0.1,
    )  # fmt: skip
    send(shop, *range(5))
    stream = shop.state.settings.stream
    api(server.url, f"STREAM.DELETE.{stream}")
    shop.broker.setup(shop.state.streams())
    rounds = relay_rounds(shop)
    assert rewound(shop) == [stream]
    eventually(rounds, 30, "the relay does not go round")
    assert shop.store.counts()["sent"] == 5

    outbox = shop.app.test_client().get("/health/detailed").get_json()["checks"]["outbox"]
    assert (outbox["status"], outbox["rewound_streams"]) == ("failed", [stream])
    assert shop.app.test_client().get("/health/ready").status_code == 200

    assert events(shop).resend(missing_only=True) == 5
    outbox = shop.app.test_client().get("/health/detailed").get_json()["checks"]["outbox"]
    assert (outbox["status"], outbox["rewound_streams"]) == ("ok", [])


def relay_rounds(shop: OutboxShop) -> Callable[[], bool]:
    """Start a relay that always cleans; returns whether it went round again since it noticed."""
    relay = shop.relay()
    relay.housekeeping.timing = Timing(clean=0.0)
    shop.start_relay(relay)
    eventually(lambda: rewound(shop), 60, "it is not noticed")
    seen = time.monotonic()
    return lambda: relay.beat > seen


def test_resend_since_goes_by_the_time_and_says_if_more_is_missing(
    shop: OutboxShop, server: NatsServer
) -> None:
    with loses_what_is_sent(shop, server):
        send(shop, *range(3))
        send(shop, *range(3, 5))
    since = shop.rows[3]["sent_at"]
    shop.relay().run_once()

    assert events(shop).count(since) == 2
    assert events(shop).resend(since) == 2
    assert rewound(shop), "the first three are missing"
    assert events(shop).resend(missing_only=True) == 3
    assert rewound(shop) == []


def test_what_the_stream_dropped_by_its_limits_is_expired(
    make_shop: MakeShop, sqlite: str, server: NatsServer
) -> None:
    shop = make_shop(sqlite, urls=server.url, stream_config={"max_msgs": 4})
    send(shop, *range(10))
    found = events(shop).verify(full=True)
    assert (found.present, found.expired, found.missing) == (4, 6, [])
    assert rewound(shop) == []


def test_a_sample_of_the_older_ones(shop: OutboxShop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "NEWEST", 1)
    monkeypatch.setattr(verification, "SAMPLE", 10)
    send(shop, *range(700))
    seen: list[int] = []
    found = events(shop).verify(progress=seen.append)
    assert (found.rows, found.checked, found.present) == (700, 520, 520)
    assert sum(seen) == 700


# --- the commands


def invoke(shop: OutboxShop, *arguments: str) -> tuple[int, str]:
    result = shop.app.test_cli_runner().invoke(natspubsub, arguments)
    return result.exit_code, result.stdout


def test_verify_and_resend_commands(shop: OutboxShop, server: NatsServer) -> None:
    send(shop, *range(3))
    assert invoke(shop, "outbox", "verify")[0] == 0
    with loses_what_is_sent(shop, server):
        send(shop, *range(3, 5))
    missing = {row["event_id"] for row in shop.rows[3:]}

    code, text = invoke(shop, "outbox", "verify", "--full", "--json")
    assert (code, set(json.loads(text)["missing"])) == (1, missing)
    code, text = invoke(shop, "outbox", "verify", "--since", "1h")
    assert code == 1
    assert all(event_id in text for event_id in missing)
    assert invoke(shop, "outbox", "verify", "--since", "2999-01-01")[0] == 0

    assert invoke(shop, "outbox", "resend")[0] == 2
    assert invoke(shop, "outbox", "resend", "--since", "soon")[0] == 2
    code, text = invoke(shop, "outbox", "resend", "--since", "1h", "--dry-run", "--json")
    assert (code, json.loads(text)) == (0, {"action": "resend", "count": 5, "dry_run": True})
    code, text = invoke(shop, "outbox", "resend", "--since", "1h", "--missing-only")
    assert (code, text) == (0, "to be sent again: 2\n")
    assert shop.relay().run_once() == 2
    assert invoke(shop, "outbox", "verify", "--full")[0] == 0


def test_only_apps_with_a_database_have_sent_events(make_pubsub: MakePubsub) -> None:
    pubsub = make_pubsub(urls="memory://")
    with pytest.raises(ConfigurationError, match="need a database"):
        _ = pubsub.sent_events
