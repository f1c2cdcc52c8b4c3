"""Random programs of transactions, savepoints, publishes and errors, on real databases.

Each program is carried out and, beside it, on a model that knows nothing of databases: a stack
of lists. In the end what the relay has sent is what the model says was committed, in order.
``TORTURE=1`` runs ten thousand programs on each database.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import blinker
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from .conftest import MakeShop, MakeUrl
from .shop import OutboxShop, begin_transactions, message_of

TORTURE = os.environ.get("TORTURE") == "1"
PROGRAMS = {"sqlite": 10_000, "postgresql": 10_000, "mysql": 2_000}
FEWER = {"sqlite": 200, "postgresql": 60, "mysql": 30}
STEPS = 20

#: What is published: the topic's last token, and a number.
Event = tuple[str, int]


@dataclass
class Level:
    """A transaction, or a savepoint in it, as the model knows it."""

    events: list[Event] = field(default_factory=list)
    products: dict[int, int] = field(default_factory=dict)


@dataclass
class Flush:
    """What has not been flushed yet."""

    events: list[Event] = field(default_factory=list)
    created: dict[int, int] = field(default_factory=dict)
    updated: dict[int, int] = field(default_factory=dict)
    deleted: list[int] = field(default_factory=list)


@dataclass
class Tally:
    """What all programs together have come to."""

    programs: int = 0
    steps: int = 0
    committed: int = 0
    relayed: int = 0
    ghosts: int = 0
    missing: int = 0

    def __str__(self) -> str:
        return (
            f"{self.programs:,} programs, {self.steps:,} steps: {self.committed:,} rows committed, "
            f"{self.relayed:,} relayed, {self.ghosts} ghosts, {self.missing} missing"
        )


class World:
    """One app for all programs: making one for each would take most of the time."""

    def __init__(self, shop: OutboxShop) -> None:
        self.shop = shop
        self.signal = blinker.Signal()
        self.tally = Tally()
        self.number = 0
        self.last_sequence = 0
        shop.pubsub.forward_signal(self.signal, "signal.sent", lambda _, n: {"id": n})
        shop.pubsub.publish_changes(shop.Product, "product", fields=["id", "stock"])
        begin_transactions(shop.engine)

    def next_number(self) -> int:
        self.number += 1
        return self.number

    def relayed(self) -> list[Event]:
        """Relay, and return what that added to the stream."""
        shop = self.shop
        shop.relay().run_once()
        stream = shop.state.settings.stream
        messages = list(shop.broker.messages(stream, after=self.last_sequence))
        if messages:
            self.last_sequence = messages[-1].sequence
        return [
            (message.subject.rpartition(".")[2], message_of(message.data)["id"])
            for message in messages
        ]


class Programs(RuleBasedStateMachine):
    """A program: steps in one application context, or several one after the other."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.shop = world, world.shop
        self.committed = Level()
        self.levels: list[Level] = [Level()]
        self.unflushed = Flush()
        self.savepoints: list[Any] = []
        self.expected: list[Event] = []
        self.context = self.shop.app.app_context()

    @initialize()
    def begin(self) -> None:
        self.context.push()

    def teardown(self) -> None:
        self.commit()
        self.context.pop()
        self.check()
        self.world.tally.programs += 1

    def check(self) -> None:
        relayed, tally = self.world.relayed(), self.world.tally
        tally.committed += len(self.expected)
        tally.relayed += len(relayed)
        tally.ghosts += len(set(relayed) - set(self.expected))
        tally.missing += len(set(self.expected) - set(relayed))
        assert relayed == self.expected
        self.expected = []

    # --- the model

    @property
    def top(self) -> Level:
        return self.levels[-1]

    def products(self) -> dict[int, int]:
        """The products that there are now, flushed or not, with their stock."""
        alive = dict(self.committed.products)
        for level in self.levels:
            alive.update(level.products)
        alive.update(self.unflushed.created)
        alive.update(self.unflushed.updated)
        gone = {key for key, stock in alive.items() if stock < 0} | set(self.unflushed.deleted)
        return {key: stock for key, stock in alive.items() if key not in gone}

    def flushed_products(self) -> list[int]:
        new = self.unflushed.created
        return sorted(key for key in self.products() if key not in new)

    def model_flush(self) -> None:
        """Publishes are inserted by the flush; what it has changed is published at its end."""
        self.top.events += self.unflushed.events
        for key, stock in self.unflushed.created.items():
            self.top.events.append(("created", key))
            self.top.products[key] = stock
        for key, stock in sorted(self.unflushed.updated.items()):
            self.top.events.append(("updated", key))
            self.top.products[key] = stock
        for key in self.unflushed.deleted:
            self.top.events.append(("deleted", key))
            self.top.products[key] = -1
        self.unflushed = Flush()

    def model_release(self) -> None:
        level = self.levels.pop()
        merge(level, self.top)

    def model_rollback(self) -> None:
        self.levels, self.savepoints, self.unflushed = [Level()], [], Flush()

    # --- publishing

    @rule(key=st.sampled_from([None, "a", "b"]))
    def publish(self, key: str | None) -> None:
        number = self.world.next_number()
        self.shop.pubsub.publish("order.published", {"id": number}, ordering_key=key)
        self.unflushed.events.append(("published", number))

    @rule(count=st.integers(2, 4))
    def publish_many(self, count: int) -> None:
        numbers = [self.world.next_number() for _ in range(count)]
        self.shop.pubsub.publish_many([("order.many", {"id": number}) for number in numbers])
        self.unflushed.events += [("many", number) for number in numbers]

    @rule()
    def send_signal(self) -> None:
        number = self.world.next_number()
        self.world.signal.send(n=number)
        self.unflushed.events.append(("sent", number))

    @rule()
    def publish_what_is_refused(self) -> None:
        with suppress(ValueError):
            self.shop.pubsub.publish("order.refused", {"id": float("nan")})

    # --- changing rows

    @rule()
    def create_product(self) -> None:
        key = self.world.next_number()
        self.shop.session.add(self.shop.Product(id=key, name="product", stock=key))
        self.unflushed.created[key] = key

    @precondition(lambda self: self.flushed_products())
    @rule(data=st.data())
    def update_product(self, data: st.DataObject) -> None:
        product, key = self.pick(data)
        product.stock = self.unflushed.updated[key] = self.world.next_number()

    @precondition(lambda self: self.flushed_products())
    @rule(data=st.data())
    def delete_product(self, data: st.DataObject) -> None:
        product, key = self.pick(data)
        with self.shop.session.no_autoflush:
            self.shop.session.delete(product)
        self.unflushed.updated.pop(key, None)
        self.unflushed.deleted.append(key)

    def pick(self, data: st.DataObject) -> tuple[Any, int]:
        key = data.draw(st.sampled_from(self.flushed_products()))
        with self.shop.session.no_autoflush:
            product = self.shop.session.get(self.shop.Product, key)
        assert product is not None
        return product, key

    # --- transactions

    @rule()
    def flush(self) -> None:
        self.shop.session.flush()
        self.model_flush()

    @precondition(lambda self: len(self.savepoints) < 4)
    @rule()
    def savepoint(self) -> None:
        self.savepoints.append(self.shop.session.begin_nested())
        self.model_flush()
        self.levels.append(Level())

    @precondition(lambda self: self.savepoints)
    @rule()
    def release(self) -> None:
        self.savepoints.pop().commit()
        self.model_flush()
        self.model_release()

    @precondition(lambda self: self.savepoints)
    @rule()
    def rollback_to_savepoint(self) -> None:
        self.savepoints.pop().rollback()
        self.unflushed = Flush()
        self.levels.pop()

    @precondition(lambda self: len(self.savepoints) > 1)
    @rule()
    def rollback_to_an_outer_savepoint(self) -> None:
        self.savepoints[0].rollback()
        self.savepoints, self.unflushed = [], Flush()
        del self.levels[1:]

    @rule()
    def commit(self) -> None:
        self.shop.session.commit()
        self.model_flush()
        self.savepoints = []
        while len(self.levels) > 1:
            self.model_release()
        self.expected += self.top.events
        merge(self.levels.pop(), self.committed)
        self.levels.append(Level())

    @rule()
    def rollback(self) -> None:
        self.shop.session.rollback()
        self.model_rollback()

    @rule()
    def next_context(self) -> None:
        """As at the end of a request: what was not committed is gone."""
        self.context.pop()
        self.model_rollback()
        self.context = self.shop.app.app_context()
        self.context.push()
        self.check()

    # --- errors

    @rule()
    def error_in_a_savepoint(self) -> None:
        with suppress(ZeroDivisionError), self.shop.session.begin_nested():
            self.model_flush()
            self.shop.pubsub.publish("order.lost", {"id": self.world.next_number()})
            raise ZeroDivisionError

    @rule()
    def constraint_in_a_savepoint(self) -> None:
        with suppress(sa.exc.DBAPIError), self.shop.session.begin_nested():
            self.model_flush()
            self.shop.pubsub.publish("order.lost", {"id": self.world.next_number()})
            self.shop.session.add(self.shop.Order(name=None))

    @rule()
    def constraint_at_the_commit(self) -> None:
        self.shop.pubsub.publish("order.lost", {"id": self.world.next_number()})
        self.shop.session.add(self.shop.Order(name=None))
        with pytest.raises(sa.exc.DBAPIError):
            self.shop.session.commit()
        self.shop.session.rollback()
        self.model_rollback()

    @invariant()
    def count(self) -> None:
        self.world.tally.steps += 1


def merge(level: Level, into: Level) -> None:
    into.events += level.events
    into.products |= level.products


@pytest.fixture(params=list(PROGRAMS))
def world(request: pytest.FixtureRequest, use_url: MakeUrl, make_shop: MakeShop) -> World:
    return World(make_shop(use_url(request.param), outbox_batch_size=3))


def test_what_is_relayed_is_what_was_committed(
    world: World, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = request.node.callspec.params["world"]
    count = (PROGRAMS if TORTURE else FEWER)[kind]
    run_state_machine_as_test(
        lambda: Programs(world),
        settings=settings(
            max_examples=count,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    with capsys.disabled():
        print(f"\n{kind}: {world.tally}")
    assert world.tally.programs >= count
    # How much few programs come to is chance; that most of them did something is not.
    assert world.tally.relayed == world.tally.committed > count // 4
