"""Several relays on one outbox: one sends at a time, and another takes over."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_natspubsub.outbox import upkeep
from flask_natspubsub.outbox.upkeep import LEASE_SECONDS
from tests.support.processes import Child
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

from .conftest import MakeShop, MakeUrl
from .shop import OutboxShop
from .test_relay import wait_for_lease

TORTURE = os.environ.get("TORTURE") == "1"


def expire_leases(shop: OutboxShop) -> None:
    shop.execute("UPDATE natspubsub_lease SET expires_at = 1")


# --- in one process, with the database's clock


def test_one_relay_at_a_time(shop: OutboxShop) -> None:
    first, second = shop.relay(), shop.relay()
    shop.commit(1)
    assert first.step() == 1
    shop.commit(2)
    assert second.step() == 0
    assert (first.partitions, second.partitions) == ([0], [])
    assert first.step() == 1
    (lease,) = shop.store.leases.holders()
    assert lease["name"] == "outbox/0"
    assert LEASE_SECONDS - 5 < lease["seconds_left"] <= LEASE_SECONDS
    first.release()
    second.release()


def test_lease_that_was_given_back_is_free_at_once(shop: OutboxShop) -> None:
    first, second = shop.relay(), shop.relay()
    first.step()
    first.release()
    second.step()
    assert (first.partitions, second.partitions) == ([], [0])
    second.release()


def test_lease_that_has_expired_is_free(shop: OutboxShop) -> None:
    first, second = shop.relay(), shop.relay()
    first.step()
    expire_leases(shop)
    second.step()
    assert second.partitions == [0]
    assert shop.store.leases.holders()[0]["seconds_left"] > 5
    second.release()


def test_lease_of_a_clock_that_was_put_back_is_free(shop: OutboxShop) -> None:
    dead, second = shop.relay(), shop.relay()
    dead.step()
    shop.execute("UPDATE natspubsub_lease SET expires_at = expires_at + 3600")
    shop.commit(1)
    assert second.step() == 1
    assert shop.store.leases.holders()[0]["seconds_left"] <= LEASE_SECONDS
    second.release()


def test_lease_with_no_more_left_than_it_was_given_is_held(shop: OutboxShop) -> None:
    first, second = shop.relay(), shop.relay()
    first.step()
    second.step()
    assert (first.partitions, second.partitions) == ([0], [])
    first.release()


def test_lease_that_has_expired_may_be_renewed_if_nobody_took_it(shop: OutboxShop) -> None:
    relay = shop.relay()
    relay.step()
    expire_leases(shop)
    shop.commit(1)
    assert relay.step() == 1
    assert relay.lease_lost == 0
    relay.release()


def test_lease_that_was_renewed_meanwhile_is_not_taken(
    shop: OutboxShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at it and the attempt to take it."""
    leases = shop.store.leases
    lease = leases.acquire("outbox/0", "slow")
    expire_leases(shop)
    take = type(leases)._take

    def meanwhile(self: Any, wanted: Any) -> Any:
        assert leases.renew(lease)
        return take(self, wanted)

    monkeypatch.setattr(type(leases), "_take", meanwhile)
    assert leases.acquire("outbox/0", "quick") is None
    assert leases.holders()[0]["owner"] == "slow"


def test_relay_that_has_lost_its_lease_marks_nothing(shop: OutboxShop) -> None:
    """It stood still between reading and marking, and another one went on meanwhile."""
    flaky = shop.use_flaky_broker()
    slow, quick = shop.relay(), shop.relay()
    shop.commit(1, 2, 3)

    def meanwhile() -> None:
        flaky.before = lambda: None
        expire_leases(shop)
        assert quick.step() == 3
        shop.execute("UPDATE natspubsub_outbox SET stream = 'by the quick one'")

    flaky.before = meanwhile
    assert slow.step() == 0
    assert slow.lease_lost == 1
    assert (slow.partitions, quick.partitions) == ([], [0])
    assert {row["stream"] for row in shop.rows} == {"by the quick one"}
    assert shop.sent == [1, 2, 3], "the stream knows the ids"
    quick.release()


def test_relay_that_may_have_lost_its_lease_does_not_publish(
    make_shop: MakeShop, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stood still before it published: the time it knows itself to have is over."""
    monkeypatch.setattr(upkeep, "LEASE_SECONDS", 0.5)
    shop = make_shop(url)
    flaky = shop.use_flaky_broker()
    slow, quick = shop.relay(), shop.relay()
    slow.step()
    shop.commit(1)
    due = shop.store.due

    def stand_still(*arguments: int) -> object:
        rows = due(*arguments)
        shop.store.due = due
        eventually(lambda: quick.step() == len(rows) == 1)
        return rows

    shop.store.due = stand_still
    assert slow.step() == 0
    assert flaky.calls == [[1]], "by the quick one"
    assert slow.lease_lost == 1
    quick.release()


def test_failure_is_not_written_without_the_lease(shop: OutboxShop) -> None:
    from .test_relay import refused

    flaky = shop.use_flaky_broker()
    flaky.failures[1] = [refused()]
    slow = shop.relay()
    shop.commit(1, 2)

    def meanwhile() -> None:
        flaky.before = lambda: None
        shop.execute("UPDATE natspubsub_lease SET owner = 'another', token = token + 1")

    flaky.before = meanwhile
    assert slow.step() == 0
    assert [(row["status"], row["attempts"]) for row in shop.rows] == [("pending", 0)] * 2


def test_partitions_of_two_relays(make_shop: MakeShop, url: str) -> None:
    shop = make_shop(url, outbox_partitions=4)
    other = shop.store.leases.acquire("outbox/1", "a third one")
    first, second = shop.relay(), shop.relay()
    first.step()
    assert other is not None
    shop.store.leases.release(other)
    second.step()
    assert (first.partitions, second.partitions) == ([0, 2, 3], [1])
    with shop.app.app_context():
        for n in range(80):
            shop.publish(n, ordering_key=f"key-{n % 8}")
        shop.session.commit()
    partition_of = {n: row["partition"] for n, row in zip(shop.numbers, shop.rows, strict=True)}
    counts = [first.step(), second.step()]
    assert sum(counts) == 80
    assert counts[1] == sum(partition == 1 for partition in partition_of.values()) > 0
    assert sorted(shop.sent) == list(range(80))
    for partition in range(4):
        ours = [n for n in shop.sent if partition_of[n] == partition]
        assert ours == sorted(ours)
    first.release()
    second.release()


def test_many_relays_at_once_at_the_very_first_start(make_shop: MakeShop, url: str) -> None:
    """There is no lease to take yet: one creates it, none fails."""
    shop = make_shop(url, outbox_poll_interval=0.1)
    relays = [shop.start_relay() for _ in range(6)]
    eventually(lambda: sum(len(relay.partitions) for relay in relays) == 1)
    shop.commit(*range(50))
    shop.wait_for_sent(50)
    shop.wait_until_marked()
    assert shop.sent == list(range(50))
    for left in range(5, -1, -1):
        active = next(relay for relay in relays if relay.partitions)
        relays.remove(active)
        shop.stop_relay(active)
        if left:
            eventually(lambda: any(relay.partitions for relay in relays), 2, "not at once")
    assert sum(relay.lease_lost for relay in relays) == 0


def test_poll_interval_longer_than_a_lease_keeps_the_lease(
    make_shop: MakeShop, sqlite: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(upkeep, "LEASE_SECONDS", 0.6)
    shop = make_shop(sqlite, outbox_poll_interval=60)
    first = shop.start_relay()
    wait_for_lease(first)
    second = shop.start_relay()
    with shop.counting() as statements:
        eventually(lambda: sum("UPDATE natspubsub_lease" in one for one in statements) > 6)
    assert (first.partitions, second.partitions) == ([0], [])
    assert first.lease_lost == 0


# --- processes


StartProcess = Callable[..., Child]


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[StartProcess]:
    """Start relays in processes, see ``relay_process``; they are killed at the end."""
    started: list[Child] = []

    def start(shop: OutboxShop, *options: str) -> Child:
        settings = shop.state.settings
        url = shop.engine.url.render_as_string(hide_password=False)
        where = [url, settings.urls[0], settings.env]
        command = [sys.executable, "-m", __package__ + ".relay_process", *where, *options]
        started.append(Child(command, tmp_path / f"relay-{len(started)}.log", role="relay"))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def test_stand_by_takes_over_within_15_seconds_of_a_kill(
    nats_shop: OutboxShop, start_process: StartProcess
) -> None:
    shop = nats_shop
    active = start_process(shop)
    active.wait_for_log("leased")
    stand_by = start_process(shop)
    shop.commit(1)
    shop.wait_for_sent(1)
    active.signal(signal.SIGKILL)
    began = time.monotonic()
    active.wait()
    shop.commit(2)
    shop.wait_for_sent(2, 16)
    assert time.monotonic() - began < 15
    stand_by.wait_for_log("leased")
    shop.wait_until_marked()


def test_stand_by_takes_over_at_once_after_sigterm(
    nats_shop: OutboxShop, start_process: StartProcess
) -> None:
    shop = nats_shop
    active = start_process(shop)
    active.wait_for_log("leased")
    stand_by = start_process(shop, "outbox_poll_interval=60")
    shop.commit(1)
    shop.wait_for_sent(1)
    stand_by.wait_for_log("looked")
    active.signal(signal.SIGTERM)
    assert active.wait() == 0
    began = time.monotonic()
    stand_by.wait_for_log("leased", timeout=5)
    assert time.monotonic() - began < 2
    shop.commit(2)
    shop.wait_for_sent(2, 2)
    assert "lost 0" in active.log


def test_relay_that_was_frozen_finds_its_lease_lost(
    nats_shop: OutboxShop, start_process: StartProcess
) -> None:
    shop = nats_shop
    frozen = start_process(shop, "lease=1")
    frozen.wait_for_log("leased")
    frozen.signal(signal.SIGSTOP)
    other = start_process(shop, "lease=1")
    other.wait_for_log("leased")
    shop.commit(*range(10))
    shop.wait_for_sent(10)
    shop.wait_until_marked()
    before = shop.rows
    frozen.signal(signal.SIGCONT)
    shop.commit(10)
    shop.wait_for_sent(11)
    shop.wait_until_marked()
    frozen.wait_for_log("noticed")  # it may be slow to come back
    frozen.signal(signal.SIGTERM)
    frozen.wait_for_log("lost 1")
    assert shop.rows[:10] == before
    assert shop.sent == list(range(11))


def test_killed_between_publish_and_mark(
    nats_shop: OutboxShop,
    start_process: StartProcess,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The rows are sent again, and within the duplicate window the stream takes none twice."""
    shop, kills = nats_shop, 200 if TORTURE else 3
    count = 0
    for kill in range(kills):
        shop.commit(*range(count, count + 20))
        count += 20
        options = ["lease=1", "outbox_batch_size=10", f"die_before_mark={1 + kill % 3}"]
        dying = start_process(shop, *options)
        assert dying.wait() == 9
    relay = start_process(shop, "lease=1")
    shop.wait_until_marked(30)
    relay.signal(signal.SIGTERM)
    relay.wait()
    assert shop.sent == list(range(count))
    with capsys.disabled():
        print(f"\n{kills} kills between publish and mark: {count} rows, {len(shop.sent)} stored")


def test_ten_relays(
    make_shop: MakeShop,
    use_url: MakeUrl,
    nats_server: NatsServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each row is sent once, and in the order of its partition, whoever comes and goes."""
    rows, relays, partitions = (100_000, 10, 4) if TORTURE else (2_000, 5, 4)
    shop = make_shop(
        use_url("postgresql"),
        urls=nats_server.url,
        outbox_partitions=partitions,
        outbox_batch_size=100,
        outbox_poll_interval=0.1,
    )
    running = [shop.start_relay() for _ in range(relays)]
    for start in range(0, rows, 500):
        shop.commit(*range(start, start + 500))
        if start % 1000 == 0 and len(running) > 1:
            shop.stop_relay(running.pop(0))
    shop.wait_for_sent(rows, 300)
    shop.wait_until_marked()
    assert shop.count_stored() == rows
    order: dict[int, list[int]] = {}
    for row in shop.rows:
        order.setdefault(row["partition"], []).append(row["stream_sequence"])
    assert len(order) == partitions
    assert all(sequences == sorted(sequences) for sequences in order.values())
    assert sum(relay.lease_lost for relay in running) == 0
    with capsys.disabled():
        print(f"\n{relays} relays: {rows:,} rows, {shop.count_stored():,} stored, in order")
