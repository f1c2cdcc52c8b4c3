from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import inspect
import ipaddress
import json
import socket
import time
import types
import uuid
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypedDict

import msgspec
import pydantic
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import orm
from werkzeug.datastructures import CombinedMultiDict, Headers, ImmutableMultiDict, MultiDict

from flask_natspubsub.errors import DecodingError, EncodingError, RegistrationError
from flask_natspubsub.messages import codec, plain
from flask_natspubsub.messages.plain import plain_object

MOMENT = dt.datetime(2025, 1, 2, 3, 4, 5, 678901, tzinfo=dt.UTC)
PLUS_TWO = dt.timezone(dt.timedelta(hours=2))
AN_ID = uuid.UUID("0190a5d8-0000-7000-8000-000000000000")


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Word(str, enum.Enum):  # noqa: UP042 - the older form is what is tested
    YES = "yes"


@dataclasses.dataclass
class Line:
    sku: str
    price: decimal.Decimal


@dataclasses.dataclass
class Order:
    order_id: int
    lines: list[Line] = dataclasses.field(default_factory=list)
    at: dt.datetime | None = None
    _note: str = "kept"


class Placed(msgspec.Struct, rename="camel", tag=True):
    order_id: int
    placed_at: dt.datetime
    note: str | msgspec.UnsetType = msgspec.UNSET


class Sparse(msgspec.Struct, omit_defaults=True):
    a: int = 1
    b: list[int] = msgspec.field(default_factory=list)
    c: str | None = None
    d: object = None


class Row(msgspec.Struct, array_like=True, tag="row"):
    a: int
    b: object


class Model(pydantic.BaseModel):
    order_id: int = pydantic.Field(alias="orderId")
    at: dt.datetime | None = None
    ids: set[int] = set()
    inner: dict[str, list[dt.datetime]] = {}
    ip: pydantic.IPvAnyAddress | None = None


class Typed(TypedDict):
    order_id: int
    at: dt.datetime


def encode_object(message: object) -> bytes:
    return codec.encode_value(plain_object(message))


def encoded(message: object) -> Any:
    return json.loads(encode_object(message))


def refusal(message: object) -> EncodingError:
    with pytest.raises(EncodingError) as caught:
        encode_object(message)
    return caught.value


# --- what is sent --------------------------------------------------------------------------


def test_json_is_compact_in_the_callers_order_and_not_escaped() -> None:
    message = {"z": 1, "a": [True, None, 1.5], "ü/\u2028": 'é"\n\x7f'}
    assert encode_object(message) == (
        '{"z":1,"a":[true,null,1.5],"ü/\u2028":"é\\"\\n\x7f"}'.encode()
    )


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (MOMENT, "2025-01-02T03:04:05.678901Z"),
        (MOMENT.replace(microsecond=0), "2025-01-02T03:04:05Z"),
        (MOMENT.astimezone(PLUS_TWO), "2025-01-02T03:04:05.678901Z"),
        (dt.date(2025, 1, 2), "2025-01-02"),
        (dt.time(3, 4, 5), "03:04:05"),
        (dt.timedelta(hours=1), "PT3600S"),
        (AN_ID, str(AN_ID)),
        (decimal.Decimal("10.50"), "10.50"),
        (Color.RED, "red"),
        (Level.HIGH, 3),
        (Word.YES, "yes"),
        ((1, "a"), [1, "a"]),
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset({"b", "a"}), ["a", "b"]),
        (set(), []),
        (types.MappingProxyType({"a": 1}), {"a": 1}),
        (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (2**53 + 1, 2**53 + 1),
        (-(2**63) - 1, -(2**63) - 1),
        (10**300, 10**300),
        (Line("a", decimal.Decimal("1.10")), {"sku": "a", "price": "1.10"}),
        ({Word.YES: 1}, {"yes": 1}),
        ("", ""),
        ("a\x00b", "a\x00b"),
    ],
)
def test_values_have_their_json_form(value: object, form: object) -> None:
    assert encoded({"value": value}) == {"value": form}
    assert encoded({"list": [value]}) == {"list": [form]}


class Base(orm.MappedAsDataclass, orm.DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    password_hash: orm.Mapped[str] = orm.mapped_column(repr=False)


@orm.registry().mapped
class Account:
    """Neither a dataclass nor a subclass of anything."""

    __tablename__ = "accounts"
    id = sa.Column(sa.Integer, primary_key=True)


@dataclasses.dataclass
class WithUser:
    users: list[Any]


class UserStruct(msgspec.Struct):
    user: Any


class UserModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    user: User


class UserModels(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    inner: dict[str, list[UserModel]]


SECRET_USER = User(id=1, password_hash="scrypt:1")


@pytest.mark.parametrize(
    ("message", "path"),
    [
        (SECRET_USER, "$"),
        ({"user": SECRET_USER}, "$.user"),
        ({"users": [1, (SECRET_USER,)]}, "$.users[1][0]"),
        (WithUser([SECRET_USER]), "$.users[0]"),
        (UserStruct(SECRET_USER), "$.user"),
        (UserModel.model_construct(user=SECRET_USER), "$.user"),
        (
            UserModels.model_construct(inner={"a": [UserModel.model_construct(user=SECRET_USER)]}),
            "$.inner.a[0].user",
        ),
        ({"account": Account()}, "$.account"),
    ],
)
def test_a_database_model_is_refused_wherever_it_is(message: Any, path: str) -> None:
    with pytest.raises(EncodingError, match=r"Pass the fields that are wanted") as caught:
        plain_object(message)
    assert caught.value.path == path
    assert "scrypt" not in str(caught.value)


class HidesUser(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    user: Any = pydantic.Field(exclude=True)
    user_id: int


def test_a_database_model_that_is_not_sent_is_none_of_our_business() -> None:
    assert plain_object(HidesUser(user=SECRET_USER, user_id=1)) == {"user_id": 1}


FORM = [("name", "Ada"), ("tag", "a"), ("tag", "b"), ("note", "")]


@pytest.mark.parametrize(
    "form",
    [
        MultiDict(FORM),
        ImmutableMultiDict(FORM),
        CombinedMultiDict([MultiDict(FORM[:2]), MultiDict(FORM[2:])]),
        Headers(FORM),
    ],
    ids=lambda form: type(form).__name__,
)
def test_a_field_that_is_repeated_keeps_all_its_values(form: Any) -> None:
    plain = {"name": "Ada", "tag": ["a", "b"], "note": ""}
    assert plain_object(form) == plain
    assert plain_object({"form": [form]}) == {"form": [plain]}


def test_a_dataclass_is_its_fields() -> None:
    order = Order(42, [Line("a", decimal.Decimal("1.10"))], MOMENT)
    assert encoded(order) == {
        "order_id": 42,
        "lines": [{"sku": "a", "price": "1.10"}],
        "at": "2025-01-02T03:04:05.678901Z",
        "_note": "kept",
    }


@pytest.mark.parametrize(
    "struct",
    [
        Placed(1, MOMENT),
        Placed(1, MOMENT, "hello"),
        Sparse(),
        Sparse(a=2, b=[1], c="x", d={"k": Row(1, None)}),
        Sparse(d=[Row(1, [2]), Placed(3, MOMENT)]),
    ],
)
def test_a_struct_is_written_as_msgspec_writes_it(struct: msgspec.Struct) -> None:
    assert encode_object(struct) == msgspec.json.encode(struct)


def test_a_pydantic_model_is_its_json_dump_with_aliases() -> None:
    model = Model(orderId=1, at=MOMENT, ids={2, 1}, ip=ipaddress.ip_address("10.0.0.1"))
    assert encoded(model) == {
        "orderId": 1,
        "at": "2025-01-02T03:04:05.678901Z",
        "ids": [1, 2],
        "inner": {},
        "ip": "10.0.0.1",
    }
    assert encoded({"model": [model]})["model"][0]["orderId"] == 1


def test_a_pydantic_model_sends_datetimes_in_utc_and_refuses_naive_ones() -> None:
    plus_two = Model(orderId=1, inner={"a": [MOMENT.astimezone(PLUS_TWO)]})
    assert encoded(plus_two)["inner"] == {"a": ["2025-01-02T03:04:05.678901Z"]}
    naive = Model(orderId=1, inner={"a": [MOMENT, MOMENT.replace(tzinfo=None)]})
    assert refusal(naive).path == "$.inner.a[1]"


def test_a_pydantic_model_keeps_the_format_of_its_own_serializers() -> None:
    class Own(pydantic.BaseModel):
        at: dt.datetime

        @pydantic.field_serializer("at", when_used="json")
        def year(self, value: dt.datetime) -> str:
            return f"year {value.year}"

    assert encoded(Own(at=dt.datetime(2025, 1, 2))) == {"at": "year 2025"}


def test_a_pydantic_model_that_cannot_be_dumped_is_refused() -> None:
    class Broken(pydantic.BaseModel):
        data: bytes = b"\xff"

    assert refusal({"a": Broken()}).path == "$.a"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # No text with half a surrogate pair: that is not Unicode.
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), json_values))
def test_what_json_can_carry_comes_back_as_it_was(message: dict[str, Any]) -> None:
    data = encode_object(message)
    assert codec.decode_object(data) == message
    assert json.loads(data) == message


# --- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        float("-inf"),
        decimal.Decimal("NaN"),
        decimal.Decimal("Infinity"),
        b"bytes",
        bytearray(b"bytes"),
        memoryview(b"bytes"),
        MOMENT.replace(tzinfo=None),
        dt.datetime.min.replace(tzinfo=PLUS_TWO),
        {1: "a"},
        {None: "a"},
        {(1, 2): "a"},
        {b"a": 1},
        {Color.RED: 1},
        {1, "a"},
        {"a", None},
        object(),
        object,
        Order,
        Color,
        socket.socket,
        (n for n in "abc"),
        1j,
        10**1000,
        "\ud800",
        {"\udfff": 1},
        msgspec.UNSET,
    ],
)
def test_what_json_cannot_carry_is_refused_with_its_path(value: object) -> None:
    assert refusal({"value": value}).path == "$.value"
    assert refusal({"items": [1, 2, {"price": value}]}).path == "$.items[2].price"


def test_values_inside_typed_messages_are_checked_too() -> None:
    assert refusal(Order(1, at=dt.datetime(2025, 1, 2))).path == "$.at"
    assert refusal(Placed(1, dt.datetime(2025, 1, 2))).path == "$.placedAt"
    assert refusal(Sparse(d={"x": [b"bytes"]})).path == "$.d.x[0]"
    assert refusal({"rows": [Row(1, {2: 3})]}).path == "$.rows[0][2]"


def test_a_key_that_is_no_name_is_quoted_in_the_path() -> None:
    assert refusal({"unit price": {"a.b\n": b""}}).path == "$['unit price']['a.b\\n']"


def test_the_error_says_what_and_where() -> None:
    error = refusal({"items": [{"price": float("nan")}]})
    assert str(error).startswith("The value at $.items[0].price is nan, which JSON cannot carry.")


@pytest.mark.parametrize("message", [None, 1, "text", [1], ("a",), {1}, MOMENT, Row(1, 2)])
def test_a_message_is_an_object(message: object) -> None:
    assert refusal(message).path == "$"


def test_a_message_that_contains_itself_is_refused() -> None:
    looped: dict[str, Any] = {}
    looped["self"] = [looped]
    assert "contains itself" in str(refusal(looped))
    order = Order(1)
    order.lines.append(order)  # type: ignore[arg-type]
    assert refusal(order).path.startswith("$.lines[0].lines[0]")


def nested(levels: int) -> dict[str, Any]:
    message: dict[str, Any] = {}
    for _ in range(levels - 1):
        message = {"a": message}
    return message


def test_a_message_leaves_one_level_of_nesting_for_the_envelope() -> None:
    data = encode_object(nested(99))
    assert codec.decode_object(b'{"message":' + data + b"}")
    refusal(nested(100))
    refusal(nested(5000))


@pytest.mark.parametrize(
    ("message", "name"),
    [({}, None), (types.MappingProxyType({}), None), (Order(1), "Order")],
)
def test_the_message_type_is_the_class_of_a_typed_message(message: object, name: str) -> None:
    assert plain.message_type_of(message) == name


def test_the_message_type_of_structs_and_models_is_their_class() -> None:
    assert plain.message_type_of(Placed(1, MOMENT)) == "Placed"
    assert plain.message_type_of(Model(orderId=1)) == "Model"


# --- reading -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"{",
        b"{}x",
        b"null",
        b"[]",
        b'"text"',
        b"1",
        b"true",
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":"\xff"}',
        b'{"a":"\\ud800"}',
        b'{"a":"\xed\xa0\x80"}',
        b"{'a':1}",
        b'{"a":1,}',
        b"\xef\xbb\xbf{}",
        b"\x00",
        b'{"a":' + b"9" * 5000 + b"}",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_json_object_is_malformed(data: bytes) -> None:
    with pytest.raises(DecodingError) as caught:
        codec.decode_object(data)
    assert caught.value.reason == "malformed"


@given(st.binary())
def test_any_bytes_decode_to_an_object_or_are_malformed(data: bytes) -> None:
    with contextlib.suppress(DecodingError):
        assert isinstance(codec.decode_object(data), dict)


def test_of_a_key_that_occurs_twice_the_last_counts() -> None:
    assert codec.decode_object(b'{"a":1,"a":2}') == {"a": 2}


def test_nesting_is_allowed_to_100_levels() -> None:
    def arrays(levels: int) -> bytes:
        return b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"

    assert codec.decode_object(arrays(100))
    for levels in (101, 500, 5000):
        with pytest.raises(DecodingError, match="nested"):
            codec.decode_object(arrays(levels))


def test_many_brackets_side_by_side_are_not_deep() -> None:
    assert len(codec.decode_object(b'{"a":[' + b"[]," * 500 + b'[]],"b":"[[[["}')["a"]) == 501


@pytest.mark.parametrize("tail", [b"", b"]" * 100_000 + b"}"])
def test_a_bomb_of_brackets_is_refused_quickly(tail: bytes) -> None:
    bomb = b'{"a":' + b"[" * 100_000 + tail
    start = time.thread_time()
    with pytest.raises(DecodingError):
        codec.decode_object(bomb)
    assert time.thread_time() - start < 0.05


def test_values_of_our_own_go_through_unchanged() -> None:
    assert codec.encode_value([1, {"a": None}]) == b'[1,{"a":null}]'
    assert codec.decode_value(b'[1,{"a":null}]') == [1, {"a": None}]
    assert codec.decode_value('"ü"') == "ü"
    with pytest.raises(DecodingError):
        codec.decode_value("nope")


# --- decoding into types -------------------------------------------------------------------


@pytest.mark.parametrize(
    "annotation",
    [
        inspect.Parameter.empty,
        Any,
        object,
        dict,
        dict[str, Any],
        Mapping,
        Mapping[str, Any],
        collections.abc.MutableMapping,
    ],
)
def test_without_a_type_the_message_stays_a_dict(annotation: Any) -> None:
    message = {"a": 1}
    assert codec.build_decoder(annotation)(message) is message


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (Order, Order(42, [Line("a", decimal.Decimal("1.10"))], MOMENT)),
        (Placed, Placed(1, MOMENT)),
        (Model, Model(orderId=1, at=MOMENT, ids={1, 2})),
        (Typed, Typed(order_id=1, at=MOMENT)),
    ],
)
def test_a_typed_message_comes_back_as_it_was(annotation: Any, message: object) -> None:
    received = codec.decode_object(encode_object(message))
    assert codec.build_decoder(annotation)(received) == message


def test_unknown_keys_do_not_hinder_a_typed_message() -> None:
    message = {"order_id": 1, "at": "2025-01-02T05:04:05+02:00", "new": 1}
    assert codec.build_decoder(Order)(message).order_id == 1
    assert "new" not in codec.build_decoder(Typed)(message)


def test_a_strict_pydantic_model_takes_values_from_their_json_form() -> None:
    class Strict(pydantic.BaseModel, strict=True):
        at: dt.datetime
        key: uuid.UUID

    decode = codec.build_decoder(Strict)
    message = {"at": "2025-01-02T03:04:05.678901Z", "key": str(AN_ID)}
    assert decode(message) == Strict(at=MOMENT, key=AN_ID)
    with pytest.raises(DecodingError):
        decode({"at": 5, "key": str(AN_ID)})


@dataclasses.dataclass
class Positive:
    amount: int

    def __post_init__(self) -> None:
        if self.amount <= 0:
            raise ValueError("amount must be positive")


@dataclasses.dataclass
class Tree:
    children: list[Tree]


def test_recursive_types_are_decoded() -> None:
    assert codec.build_decoder(Tree)({"children": [{"children": []}]}) == Tree([Tree([])])


@pytest.mark.parametrize(
    ("annotation", "message", "words"),
    [
        (Order, {}, "order_id"),
        (Order, {"order_id": "1"}, "$.order_id"),
        (Order, {"order_id": 1, "lines": [{"sku": 5, "price": 1}]}, "$.lines[0].sku"),
        (Order, [], "Order"),
        (Positive, {"amount": 0}, "must be positive"),
        (Placed, {"type": "Other"}, "$.type"),
        (Typed, {"order_id": 1}, "at"),
        (Model, {}, "$.orderId"),
        (Model, {"orderId": 1, "inner": {"a": ["never"]}}, "$.inner.a[0]"),
    ],
)
def test_a_message_that_does_not_fit_is_a_schema_error(
    annotation: Any, message: Any, words: str
) -> None:
    with pytest.raises(DecodingError, match="does not fit") as caught:
        codec.build_decoder(annotation)(message)
    assert caught.value.reason == "schema"
    assert words in str(caught.value)


@dataclasses.dataclass
class Colored:
    color: Color


class Talkative(pydantic.BaseModel):
    name: str

    @pydantic.field_validator("name")
    @classmethod
    def never(cls, value: str) -> str:
        raise ValueError(f"no such name: {value}")


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (Colored, {"color": "secret\n" * 1000}),
        (Talkative, {"name": "secret\n" * 1000}),
    ],
)
def test_a_schema_error_is_one_short_line(annotation: Any, message: Any) -> None:
    with pytest.raises(DecodingError) as caught:
        codec.build_decoder(annotation)(message)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 300
    assert caught.value.__suppress_context__


@dataclasses.dataclass
class WithSocket:
    connections: dict[str, list[socket.socket]]


@dataclasses.dataclass
class WithUnknownName:
    a: Nowhere  # type: ignore[name-defined]  # noqa: F821


@dataclasses.dataclass
class WithBadUnion:
    a: list[str] | tuple[str, ...]


class WithUnknownModel(pydantic.BaseModel):
    a: Nowhere  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    "annotation",
    [
        int,
        str,
        list,
        None,
        "Order",
        bytes,
        socket.socket,
        list[Order],
        Order | None,
        Annotated[int, "x"],
        Callable[[int], int],
        Row,
        WithSocket,
        WithUnknownName,
        WithBadUnion,
        WithUnknownModel,
    ],
    ids=repr,
)
def test_a_type_messages_cannot_have_is_refused_when_registered(annotation: Any) -> None:
    with pytest.raises(RegistrationError, match="dataclass, msgspec Struct, TypedDict or"):
        codec.build_decoder(annotation)


def test_the_refusal_names_the_field_type_at_fault() -> None:
    with pytest.raises(RegistrationError, match=r"WithSocket.*socket\.socket"):
        codec.build_decoder(WithSocket)
