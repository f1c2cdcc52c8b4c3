"""Signals and model changes that become rows of the outbox."""

from __future__ import annotations

import datetime as dt
import enum
import gc
import logging
import math
import uuid
import weakref
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from typing import Any

import blinker
import pytest
import sqlalchemy as sa

from flask_natspubsub import ConfigurationError, EncodingError, InvalidTopic, RegistrationError
from flask_natspubsub.publishing.changes import SECRET

from .conftest import MakeShop
from .shop import OutboxShop, message_of


@pytest.fixture
def signal() -> Iterator[blinker.Signal]:
    signal = blinker.Signal()
    yield signal
    signal.receivers.clear()


def published(shop: OutboxShop) -> list[tuple[str, dict[str, Any]]]:
    """Topic and message of each row, in order."""
    return [(row["subject"].split(".", 2)[2], message_of(row["payload"])) for row in shop.rows]


# --- signals


def test_signal_is_published_in_the_senders_transaction(
    shop: OutboxShop, signal: blinker.Signal
) -> None:
    shop.pubsub.forward_signal(
        signal, "order.created", lambda sender, order, **_: {"from": sender, "n": order}
    )
    with shop.app.app_context():
        signal.send("shop", order=1, more="ignored")
        assert shop.rows == []
        shop.session.commit()
        signal.send("shop", order=2)
        shop.session.rollback()
        with suppress(ZeroDivisionError), shop.session.begin_nested():
            signal.send("shop", order=3)
            raise ZeroDivisionError
        signal.send("shop", order=4)
        shop.session.commit()
    assert published(shop) == [
        ("order.created", {"from": "shop", "n": 1}),
        ("order.created", {"from": "shop", "n": 4}),
    ]


def test_arguments_are_the_message_by_default(
    sqlite_shop: OutboxShop, signal: blinker.Signal
) -> None:
    shop = sqlite_shop
    shop.pubsub.forward_signal(signal, "order.created")
    with shop.app.app_context():
        signal.send(order_id=1, total=Decimal("2.50"))
        shop.session.commit()
    assert published(shop) == [("order.created", {"order_id": 1, "total": "2.50"})]


def test_forward_as_a_decorator(sqlite_shop: OutboxShop, signal: blinker.Signal) -> None:
    shop = sqlite_shop

    @shop.pubsub.forward(signal, "order.created", ordering_key="orders")
    def order_created(sender: object, n: int, **_: object) -> dict[str, int] | None:
        return {"n": n} if n % 2 else None

    with shop.app.app_context():
        for n in (1, 2, 3):
            signal.send(n=n)
        shop.session.commit()
    assert shop.numbers == [1, 3]
    assert {row["ordering_key"] for row in shop.rows} == {"orders"}
    assert order_created(None, 5) == {"n": 5}


def test_outbox_is_used_without_the_setting(
    make_shop: MakeShop, sqlite: str, signal: blinker.Signal
) -> None:
    shop = make_shop(sqlite, use_outbox=False)
    shop.pubsub.forward_signal(signal, "order.created")
    with shop.app.app_context():
        signal.send(n=1)
        shop.session.commit()
    assert (shop.numbers, shop.sent) == ([1], [])


def test_signal_published_directly(
    make_shop: MakeShop, sqlite: str, signal: blinker.Signal
) -> None:
    shop = make_shop(sqlite, use_outbox=True)
    shop.pubsub.forward_signal(signal, "order.created", outbox=False)
    with shop.app.app_context():
        signal.send(n=1)
        shop.session.rollback()
    assert (shop.numbers, shop.sent) == ([], [1])


def test_what_the_builder_raises_reaches_the_sender(
    sqlite_shop: OutboxShop, signal: blinker.Signal
) -> None:
    shop = sqlite_shop
    shop.pubsub.forward_signal(signal, "order.created", lambda sender, n: {"n": 1 // n})
    with shop.app.app_context():
        with pytest.raises(ZeroDivisionError):
            signal.send(n=0)
        signal.send(n=1)
        shop.session.commit()
    assert shop.numbers == [1]


def test_what_cannot_be_encoded_reaches_the_sender(
    sqlite_shop: OutboxShop, signal: blinker.Signal
) -> None:
    shop = sqlite_shop
    shop.pubsub.forward_signal(signal, "order.created")
    with shop.app.app_context():
        with pytest.raises(EncodingError) as caught:
            signal.send(n=b"bytes")
        shop.publish(1)
        shop.session.commit()
    assert caught.value.path == "$.n"
    assert shop.numbers == [1]


def test_not_a_signal(sqlite_shop: OutboxShop) -> None:
    with pytest.raises(RegistrationError, match=r"blinker\.signal"):
        sqlite_shop.pubsub.forward_signal("order-placed", "order.created")  # type: ignore[arg-type]


def test_bad_option_is_refused_when_declared(
    sqlite_shop: OutboxShop, signal: blinker.Signal
) -> None:
    with pytest.raises(TypeError, match="ordering"):
        sqlite_shop.pubsub.forward_signal(signal, "order.created", ordering="k")
    assert not signal.receivers


# --- model changes


def watch(shop: OutboxShop, *fields: str) -> None:
    shop.pubsub.publish_changes(shop.Product, "product", fields=fields or None)


def test_created_updated_and_deleted(shop: OutboxShop) -> None:
    watch(shop, "id", "name", "price")
    with shop.app.app_context():
        product = shop.Product(name="Tea", price=Decimal("2.50"))
        shop.session.add(product)
        shop.session.commit()
        key = product.id
        product.price = Decimal("3.00")
        shop.session.commit()
        product.name, product.price = "Green tea", Decimal("4.00")
        shop.session.flush()
        shop.session.delete(product)
        shop.session.commit()
    assert published(shop) == [
        ("product.created", {"id": key, "name": "Tea", "price": "2.50"}),
        ("product.updated", {"id": key, "name": "Tea", "price": "3.00", "changed": ["price"]}),
        (
            "product.updated",
            {"id": key, "name": "Green tea", "price": "4.00", "changed": ["name", "price"]},
        ),
        ("product.deleted", {"id": key, "name": "Green tea", "price": "4.00"}),
    ]
    assert shop.relay().run_once() == 4


def test_change_and_row_are_one_transaction(shop: OutboxShop, sqlite_begins: None) -> None:
    watch(shop, "name")
    with shop.app.app_context():
        shop.session.add(shop.Product(name="a"))
        shop.session.flush()
        assert shop.rows == []
        shop.session.rollback()
        shop.session.add(shop.Product(name="b"))
        savepoint = shop.session.begin_nested()
        shop.session.add(shop.Product(name="c"))
        shop.session.flush()
        savepoint.rollback()
        with shop.session.begin_nested():
            shop.session.add(shop.Product(name="d"))
        shop.session.commit()
    assert [message["name"] for _, message in published(shop)] == ["b", "d"]


def test_all_columns_but_those_that_look_like_secrets(shop: OutboxShop) -> None:
    watch(shop)
    with shop.app.app_context():
        shop.session.add(shop.Product(name="Tea", api_token="secret"))
        shop.session.commit()
    ((_, message),) = published(shop)
    message.pop("id")
    assert message == {"name": "Tea", "price": None, "stock": 0}


def test_secret_that_is_named_is_published(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    watch(shop, "api_token")
    with shop.app.app_context():
        shop.session.add(shop.Product(name="Tea", api_token="named"))
        shop.session.commit()
    assert published(shop) == [("product.created", {"api_token": "named"})]


@pytest.mark.parametrize(
    "name",
    [
        "password", "password_hash", "passwordHash", "hashed_password", "user_password", "passwd",
        "pwd", "pw_hash", "pwhash", "passphrase", "secret", "client_secret", "totp_secret",
        "token", "access_token", "refreshToken", "tokens", "api_key", "apikey", "apiKey",
        "private_key", "credentials", "salt", "otp", "pin", "ssn", "cvv", "hash",
    ],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert SECRET.search(name)


@pytest.mark.parametrize(
    "name",
    ["id", "name", "price", "spin", "pinned", "shipping", "hashtag", "salted_caramel",
     "option", "key", "public_key", "keyword", "mission", "compass"],
)  # fmt: skip
def test_names_of_no_secrets(name: str) -> None:
    assert not SECRET.search(name)


def test_change_of_other_columns_publishes_nothing(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    watch(shop, "name")
    with shop.app.app_context():
        product = shop.Product(name="Tea")
        shop.session.add(product)
        shop.session.commit()
        product.stock = 5
        shop.session.commit()
        assert product.name == "Tea"
        product.name = "Tea"  # the same as before
        shop.session.commit()
    assert [topic for topic, _ in published(shop)] == ["product.created"]


def test_changed_rows_are_told_in_order_of_their_keys(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    watch(shop, "id")
    watched = 120
    with shop.app.app_context():
        shop.session.add_all(shop.Product(name=str(n)) for n in range(watched))
        shop.session.commit()
        products = shop.session.scalars(sa.select(shop.Product)).all()
        for product in reversed(products):
            product.stock = 1
        shop.pubsub.publish_changes(shop.Product, "product", fields=["id", "stock"])
        shop.session.commit()
    ids = [message["id"] for topic, message in published(shop) if topic == "product.updated"]
    assert ids == sorted(ids)
    assert len(ids) == watched


def test_expired_object_that_is_deleted_has_its_key(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    watch(shop, "name")
    with shop.app.app_context():
        product = shop.Product(name="Tea")
        shop.session.add(product)
        shop.session.commit()
        shop.session.delete(product)
        shop.session.commit()
    assert published(shop)[-1] == ("product.deleted", {"id": 1, "name": "Tea"})


def test_core_and_bulk_statements_are_not_seen(sqlite_shop: OutboxShop) -> None:
    """They fire no model events, which is why the docs say so."""
    shop = sqlite_shop
    watch(shop)
    with shop.app.app_context():
        shop.session.execute(sa.insert(shop.Product), [{"name": "a"}, {"name": "b"}])
        shop.session.execute(sa.update(shop.Product).values(stock=3))
        shop.session.query(shop.Product).filter_by(name="a").delete()
        shop.session.commit()
    assert shop.rows == []


def test_changes_take_one_statement_a_flush(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    watch(shop, "name")
    shop.commit(0)
    with shop.app.app_context(), shop.counting() as statements:
        shop.session.add_all(shop.Product(name=str(n)) for n in range(50))
        shop.session.commit()
    assert sum("natspubsub_outbox" in statement for statement in statements) == 1


def test_subclass_is_seen_as_its_base(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop

    class Book(shop.Product):  # type: ignore[name-defined,misc]
        pass

    watch(shop, "name")
    with shop.app.app_context():
        shop.session.add(Book(name="Dune"))
        shop.session.commit()
    assert published(shop) == [("product.created", {"name": "Dune"})]


def test_outbox_rows_are_no_change_themselves(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop
    watch(shop, "name")
    shop.commit(1)
    assert shop.numbers == [1]


# --- values that are no JSON: never an error in the user's commit


class Colour(enum.Enum):
    RED = object()
    BLUE = "blue"


class Upper(sa.TypeDecorator[str]):
    """Text, stored as bytes."""

    impl = sa.LargeBinary
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return value if value is None else value.encode()

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return value if value is None else value.decode()


def define_thing(shop: OutboxShop) -> Any:
    class Thing(shop.db.Model):  # type: ignore[name-defined,misc]
        id = sa.Column(sa.Uuid, primary_key=True, default=uuid.uuid4)
        naive = sa.Column(sa.DateTime)
        aware = sa.Column(sa.DateTime(timezone=True))
        day = sa.Column(sa.Date)
        hour = sa.Column(sa.Time)
        span = sa.Column(sa.Interval)
        data = sa.Column(sa.LargeBinary)
        pickled = sa.Column(sa.PickleType)
        colour = sa.Column(sa.Enum(Colour))
        price = sa.Column(sa.Numeric(10, 2))
        weight = sa.Column(sa.Float)
        extra = sa.Column(sa.JSON)
        upper = sa.Column(Upper)

    with shop.app.app_context():
        shop.db.create_all()
    return Thing


@pytest.fixture
def new_shop(make_shop: MakeShop, new_url: str) -> OutboxShop:
    """A shop on a database of its own, for more tables."""
    return make_shop(new_url)


def test_values_of_all_kinds(new_shop: OutboxShop, caplog: pytest.LogCaptureFixture) -> None:
    shop = new_shop
    thing = define_thing(shop)
    shop.pubsub.publish_changes(thing, "thing")
    noon = dt.datetime(2026, 1, 2, 12, 0, 5)
    with shop.app.app_context():
        one = thing(
            naive=noon,
            aware=noon.replace(tzinfo=dt.UTC),
            day=noon.date(),
            hour=noon.time(),
            span=dt.timedelta(minutes=2),
            data=b"1",
            pickled={1, 2},
            colour=Colour.BLUE,
            price=Decimal("1.50"),
            weight=0.5,
            extra={"tags": ["a", None], 1: {None: True}},
            upper="up",
        )
        shop.session.add(one)
        shop.session.commit()
        assert one.naive == noon  # now it has what the database has
        one.weight = 0.25
        shop.session.commit()
        key = str(one.id)
    (_, created), (_, updated) = published(shop)
    assert created == {
        "id": key, "naive": "2026-01-02T12:00:05", "aware": "2026-01-02T12:00:05Z",
        "day": "2026-01-02", "hour": "12:00:05", "span": "PT120S", "colour": "blue",
        "price": "1.50", "weight": 0.5, "extra": {"tags": ["a", None], "1": {"null": True}},
    }  # fmt: skip
    assert updated["naive"] == created["naive"]
    assert updated["changed"] == ["weight"]
    assert updated["aware"].startswith("2026-01-02T12:00:05")
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("colour", Colour.RED),
        ("weight", math.inf),
        ("extra", {"ratio": math.nan}),
        ("upper", "up"),
    ],
)
def test_value_without_a_json_form_is_left_out_and_named_once(
    sqlite_shop: OutboxShop, name: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    shop = sqlite_shop
    thing = define_thing(shop)
    shop.pubsub.publish_changes(thing, "thing", fields=("price", name))
    with shop.app.app_context():
        for price in (1, 2):
            shop.session.add(thing(price=price, **{name: value}))
            shop.session.commit()
    messages = [message for _, message in published(shop)]
    if name == "upper":
        assert messages == [{"price": 1, "upper": "up"}, {"price": 2, "upper": "up"}]
    else:
        assert messages == [{"price": 1}, {"price": 2}]
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert record.getMessage().startswith(f"Thing.{name} is left out of thing.*: ")


@pytest.mark.parametrize("name", ["data", "pickled"])
def test_binary_column_is_refused_when_named(sqlite_shop: OutboxShop, name: str) -> None:
    thing = define_thing(sqlite_shop)
    with pytest.raises(ConfigurationError, match=f"column '{name}' of Thing is binary"):
        sqlite_shop.pubsub.publish_changes(thing, "thing", fields=("id", name))


def test_model_that_refers_to_one_that_is_not_there_yet(sqlite_shop: OutboxShop) -> None:
    shop = sqlite_shop

    class Toy(shop.db.Model):  # type: ignore[name-defined,misc]
        id = sa.Column(sa.Integer, primary_key=True)
        label = sa.Column("name_of_it", sa.String(20))
        box_id = sa.Column(sa.ForeignKey("box.id"))
        box = shop.db.relationship("Box")

    shop.pubsub.publish_changes(Toy, "toy")

    class Box(shop.db.Model):  # type: ignore[name-defined,misc]
        id = sa.Column(sa.Integer, primary_key=True)

    with shop.app.app_context():
        shop.db.create_all()
        shop.session.add(Toy(label="a", box=Box()))
        shop.session.commit()
    assert published(shop) == [("toy.created", {"id": 1, "label": "a", "box_id": 1})]


def test_bad_topic_is_refused_when_registered(sqlite_shop: OutboxShop) -> None:
    with pytest.raises(InvalidTopic):
        sqlite_shop.pubsub.publish_changes(sqlite_shop.Product, "product.*")


def test_binary_key(new_shop: OutboxShop) -> None:
    shop = new_shop

    class Blob(shop.db.Model):  # type: ignore[name-defined,misc]
        id = sa.Column(sa.LargeBinary(16), primary_key=True)
        name = sa.Column(sa.String(20))

    if shop.engine.dialect.name == "mysql":
        Blob.__table__.c.id.type = sa.types.BINARY(2)
    shop.pubsub.publish_changes(Blob, "blob")
    with shop.app.app_context():
        shop.db.create_all()
        blob = Blob(id=b"\x01\x02", name="a")
        shop.session.add(blob)
        shop.session.commit()
        blob.name = "b"
        shop.session.commit()
    assert published(shop)[1][1] == {"id": "0102", "name": "b", "changed": ["name"]}


# --- what the database makes


def define_line(shop: OutboxShop) -> Any:
    class Line(shop.db.Model):  # type: ignore[name-defined,misc]
        id = sa.Column(sa.Integer, primary_key=True)
        price = sa.Column(sa.Integer)
        quantity = sa.Column(sa.Integer)
        note = sa.Column(sa.String(20))
        seen = sa.Column(sa.Integer, server_default=sa.text("7"))
        total = sa.Column(sa.Integer, sa.Computed("price * quantity", persisted=True))

    Line.double = sa.orm.column_property(Line.price * 2)
    with shop.app.app_context():
        shop.db.create_all()
    return Line


def test_computed_column_is_told_as_it_is_after_the_change(new_shop: OutboxShop) -> None:
    shop = new_shop
    line = define_line(shop)
    shop.pubsub.publish_changes(line, "line", fields=("id", "seen", "total", "double"))
    with shop.app.app_context():
        one = line(price=2, quantity=3)
        shop.session.add(one)
        shop.session.commit()
        one.quantity = 5
        shop.session.commit()
        assert (one.total, one.double) == (10, 4)
        one.note = "no change of those"
        shop.session.commit()
        assert (one.total, one.double) == (10, 4)
        one.price = 3
        shop.session.commit()
        shop.session.delete(one)
        shop.session.commit()
    (_, created), *updated, (topic, deleted) = published(shop)
    assert created == {"id": 1, "seen": 7, "total": 6, "double": 4}
    assert [message["total"] for _, message in updated] == [10, 15]
    assert "total" in updated[0][1]["changed"]
    assert updated[1][1]["changed"] == ["total", "double"]
    assert (topic, deleted["total"]) == ("line.deleted", 15)


def test_expression_is_told_as_the_value_that_it_gave(new_shop: OutboxShop) -> None:
    shop = new_shop
    line = define_line(shop)
    shop.pubsub.publish_changes(line, "line", fields=("id", "quantity"))
    with shop.app.app_context():
        one = line(price=2, quantity=3)
        shop.session.add(one)
        shop.session.commit()
        one.quantity = line.quantity + 1
        shop.session.commit()
        assert one.quantity == 4
    assert published(shop)[1:] == [
        ("line.updated", {"id": 1, "quantity": 4, "changed": ["quantity"]})
    ]


def test_unknown_column(sqlite_shop: OutboxShop) -> None:
    with pytest.raises(ConfigurationError, match=r"no column 'colour'.*name, price"):
        watch(sqlite_shop, "colour")


def test_not_a_model(sqlite_shop: OutboxShop) -> None:
    with pytest.raises(ConfigurationError, match="not a mapped class"):
        sqlite_shop.pubsub.publish_changes(int, "number")


def test_extension_that_is_gone_is_not_kept_by_what_it_watches(make_url: Any, env: str) -> None:
    with OutboxShop(make_url("sqlite"), env=env) as shop:
        watch(shop, "name")
        feed = weakref.ref(shop.pubsub)
    del shop
    gc.collect()
    assert feed() is None
