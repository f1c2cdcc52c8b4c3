"""The read model: what each fact says, from a broker in memory and a store that answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from flask_natspubsub import inspection
from flask_natspubsub.brokers.memory.broker import MemoryBroker
from flask_natspubsub.brokers.topology import wanted_streams
from flask_natspubsub.config.settings import Settings
from flask_natspubsub.inspection import PartitionLease, RewoundStream
from flask_natspubsub.messages.message import Message
from flask_natspubsub.subscribing.registry import Registry
from flask_natspubsub.subscribing.subscription import Subscription

SETTINGS = Settings.from_config({"NATSPUBSUB_PRESET": "testing"}, "shop")


class Store:
    """What ``inspection`` asks of the outbox's store."""

    def __init__(
        self,
        *,
        age: float | None = None,
        rewound: tuple[str, ...] = (),
        leases: tuple[tuple[str, float], ...] = (),
    ) -> None:
        self.oldest_pending_age = lambda: age
        records = [SimpleNamespace(name=name, reason="it is gone") for name in rewound]
        self.streams = SimpleNamespace(rewound=lambda: records)
        holders = [
            {"name": name, "owner": f"of {name}", "seconds_left": left} for name, left in leases
        ]
        self.leases = SimpleNamespace(holders=lambda: holders)


def store(**values: Any) -> Any:
    return Store(**values)


@pytest.fixture
def broker():
    broker = MemoryBroker()
    broker.want(wanted_streams(SETTINGS))
    broker.connect(1.0)
    yield broker
    broker.close()


def subscriptions(*topics: str) -> list[Subscription]:
    registry = Registry()
    registry.add(lambda message: None, *topics, name="mailer")
    return registry.resolve(SETTINGS)


def test_a_subscriber_without_a_consumer(broker: MemoryBroker) -> None:
    (facts,) = inspection.subscribers(SETTINGS, subscriptions("order.*"), broker)

    assert (facts.place.stream, facts.place.durable) == (SETTINGS.stream, "shop-mailer")
    assert facts.consumer is None
    assert facts.missing_subjects == facts.extra_subjects == ()


def test_a_subscriber_whose_server_is_not_asked() -> None:
    (facts,) = inspection.subscribers(SETTINGS, subscriptions("order.*"))

    assert facts.place.filter_subjects == ("test.shop.order.*",)
    assert facts.consumer is None


def test_a_subscriber_and_its_lag(broker: MemoryBroker) -> None:
    (one,) = subscriptions("order.*")
    broker.add_consumer(one.consumer_config(SETTINGS.stream))
    broker.submit([Message("test.shop.order.created", b"{}", {})], 1.0)

    (facts,) = inspection.subscribers(SETTINGS, [one], broker)

    assert facts.consumer is not None
    assert (facts.consumer.pending, facts.consumer.ack_pending) == (1, 0)


def test_a_consumer_that_another_version_of_the_code_has_made(broker: MemoryBroker) -> None:
    (older,) = subscriptions("order.*", "payment.made")
    (newer,) = subscriptions("order.created", "refund.made")
    broker.add_consumer(older.consumer_config(SETTINGS.stream))

    (facts,) = inspection.subscribers(SETTINGS, [newer], broker)

    assert facts.missing_subjects == ("test.shop.refund.made",)
    assert set(facts.extra_subjects) == {"test.shop.order.*", "test.shop.payment.made"}


def test_a_consumer_without_a_subscriber_is_an_orphan(broker: MemoryBroker) -> None:
    (one,) = subscriptions("order.*")
    broker.add_consumer(one.consumer_config(SETTINGS.stream))
    broker.submit([Message("test.shop.order.created", b"{}", {})], 1.0)

    assert inspection.orphaned_consumers(SETTINGS, [one], broker) == ()
    (orphan,) = inspection.orphaned_consumers(SETTINGS, [], broker)
    assert (orphan.durable, orphan.subscriber, orphan.waiting) == ("shop-mailer", "mailer", 1)
    assert orphan.is_main
    assert not orphan.retains


@pytest.mark.parametrize(
    ("age", "rewound", "is_ok"),
    [(None, (), True), (59.0, (), True), (60.0, (), False), (None, ("main",), False)],
)
def test_the_health_of_the_outbox(age: float | None, rewound: tuple[str, ...], is_ok: bool) -> None:
    health = inspection.outbox_health(store(age=age, rewound=rewound))

    assert health.is_ok is is_ok
    assert health.oldest_pending_seconds == age
    assert health.rewound == tuple(RewoundStream(name, "it is gone") for name in rewound)


def test_leases_that_ran_out_and_those_of_others_are_left_out() -> None:
    leases = inspection.partition_leases(
        store(leases=(("outbox/0", 7.5), ("outbox/1", 0.0), ("outbox/12", 3), ("schedules", 9.0)))
    )

    assert leases == {
        0: PartitionLease(0, "of outbox/0", 7.5),
        12: PartitionLease(12, "of outbox/12", 3.0),
    }


def test_rows_by_status_and_by_subscriber() -> None:
    counts = {"pending": 2, "sent": 3, "parked": 1, "oldest_pending_seconds": 4.5}
    rows = inspection.outbox_rows(SimpleNamespace(counts=lambda: counts))  # type: ignore[arg-type]
    inbox: Any = SimpleNamespace(counts=lambda: {"audit": 2, "mailer": 1})

    assert msgspec.structs.asdict(rows) == counts
    assert [(one.subscriber, one.events) for one in inspection.inbox_rows(inbox)] == [
        ("audit", 2),
        ("mailer", 1),
    ]
