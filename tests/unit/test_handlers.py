"""Which handlers are taken, how they are called, and the types their messages become."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import pytest

from flask_natspubsub.config.settings import Settings
from flask_natspubsub.errors import DecodingError, RegistrationError
from flask_natspubsub.subscribing.registry import Registry
from flask_natspubsub.subscribing.subscription import Subscription

if TYPE_CHECKING:
    from flask_natspubsub.subscribing.context import MessageContext

SETTINGS = Settings(env="test", app_name="shop")
CONTEXT: Any = SimpleNamespace(event_id="e1")


def handle(message: Any, context: Any) -> Any:
    return message, context


def resolved(handler: Any, *topics: Any, **options: Any) -> Subscription:
    """Declare one handler and return its subscription."""
    registry = Registry()
    registry.add(handler, *topics, **options)
    (subscription,) = registry.resolve(SETTINGS)
    return subscription


@pytest.fixture
def registry() -> Registry:
    return Registry()


def takes_message(message: Any) -> Any:
    return message


def takes_anything(*arguments: Any) -> Any:
    return arguments


def takes_a_default(message: Any, context: Any = None, shelf: str = "top") -> Any:
    return message, context, shelf


class Methods:
    def both(self, message: Any, context: Any) -> Any:
        return message, context

    def __call__(self, message: Any) -> Any:
        return message

    @staticmethod
    def static(message: Any) -> Any:
        return message


@pytest.mark.parametrize(
    ("handler", "result"),
    [
        (handle, ("m", CONTEXT)),
        (takes_message, "m"),
        (takes_anything, ("m", CONTEXT)),
        (takes_a_default, ("m", CONTEXT, "top")),
        (Methods().both, ("m", CONTEXT)),
        (Methods(), "m"),
        (Methods.static, "m"),
        (functools.partial(handle), ("m", CONTEXT)),
        (functools.partial(handle, "bound"), ("bound", "m")),
    ],
)
def test_any_handler_can_be_called_with_message_and_context(handler: Any, result: Any) -> None:
    assert resolved(handler, "a").handler("m", CONTEXT) == result


def takes_nothing() -> None: ...


def takes_three(message: Any, context: Any, database: Any) -> None: ...


def takes_a_keyword(message: Any, *, database: Any) -> None: ...


@pytest.mark.parametrize(
    ("handler", "signature"),
    [
        (takes_nothing, r"\(\)"),
        (takes_three, r"\(message.*, context.*, database.*\)"),
        (takes_a_keyword, r"\(message.*, \*, database.*\)"),
    ],
)
def test_a_handler_with_other_arguments_is_refused(
    registry: Registry, handler: Any, signature: str
) -> None:
    with pytest.raises(RegistrationError, match=rf"takes {signature}.*A handler takes \(message, "):
        registry.add(handler, "a")


def test_a_generator_is_refused_as_it_would_never_run(registry: Registry) -> None:
    def generate(message: Any) -> Any:
        yield message

    with pytest.raises(RegistrationError, match="is a generator"):
        registry.add(generate, "a")


def test_a_class_that_is_no_subscriber_is_refused(registry: Registry) -> None:
    with pytest.raises(RegistrationError, match="Classes subscribe by deriving from Subscriber"):
        registry.add(Methods, "a")


def test_what_cannot_be_called_is_refused(registry: Registry) -> None:
    with pytest.raises(RegistrationError, match="is not a function"):
        registry.add(5, "a")  # type: ignore[arg-type]


async def handle_later(message: Any) -> Any:
    return message


class Later:
    async def __call__(self, message: Any) -> Any:
        return message


@pytest.mark.parametrize(
    "handler", [handle_later, Later(), Later().__call__, functools.partial(handle_later)]
)
def test_async_handlers_are_recognised(handler: Any) -> None:
    assert resolved(handler, "a", name="later").is_async


def test_async_middleware_makes_the_whole_call_async() -> None:
    async def middleware(_context: Any, call_next: Any) -> Any:
        return await call_next()

    assert resolved(handle, "a", middleware=middleware).is_async


# --- message types -----------------------------------------------------------------------


@dataclasses.dataclass
class Order:
    order_id: int


class OrderDict(TypedDict):
    order_id: int


def takes_order(message: Order, context: MessageContext) -> None: ...


def takes_quoted_order(message: "Order") -> None: ...  # noqa: UP037


def takes_annotated_order(message: Annotated[Order, "what was ordered"]) -> None: ...


class TakesOrder:
    def __call__(self, message: Order) -> None: ...


def wrapped(handler: Any) -> Any:
    @functools.wraps(handler)
    def wrapper(*args: Any) -> Any:
        return handler(*args)

    return wrapper


@pytest.mark.parametrize(
    "handler",
    [
        takes_order,
        takes_quoted_order,
        takes_annotated_order,
        TakesOrder(),
        functools.partial(takes_order),
        wrapped(takes_order),
    ],
)
def test_the_message_is_decoded_into_the_annotated_type(handler: Any) -> None:
    assert resolved(handler, "a").decode({"order_id": 1}) == Order(1)


def test_what_does_not_fit_the_type_is_a_schema_error() -> None:
    with pytest.raises(DecodingError) as caught:
        resolved(takes_order, "a").decode({"order_id": "x"})
    assert caught.value.reason == "schema"


def test_a_typed_dict_is_a_type_too() -> None:
    def take(message: OrderDict) -> None: ...

    assert resolved(take, "a").decode({"order_id": 1}) == {"order_id": 1}


def test_without_an_annotation_the_message_is_the_dict() -> None:
    def take(message):  # type: ignore[no-untyped-def]
        return message

    assert resolved(take, "a").decode({"x": [None]}) == {"x": [None]}


@pytest.mark.parametrize(
    ("handler", "message_type"),
    [
        (takes_order, Order),
        (lambda message: None, None),
        (functools.partial(takes_order), Order),
    ],
)
def test_a_subscription_keeps_the_type_that_its_handler_asks_for(
    handler: Any, message_type: Any
) -> None:
    assert resolved(handler, "a", name="x").message_type is message_type


def test_any_type_is_no_type() -> None:
    def take(message: Any) -> None: ...

    def take_dict(message: dict[str, Any]) -> None: ...

    assert resolved(take, "a").message_type is None
    assert resolved(take_dict, "a").message_type == dict[str, Any]


def test_an_annotation_that_cannot_be_found_is_named_with_the_fix(registry: Registry) -> None:
    class Local:
        pass

    def take(message: Local) -> None: ...

    registry.add(take, "a")
    with pytest.raises(RegistrationError) as caught:
        registry.resolve(SETTINGS)
    assert caught.value.message == (
        f"Subscriber 'take' ({__name__}:{take.__code__.co_firstlineno}): the type 'Local' of "
        "'message' cannot be found (name 'Local' is not defined)."
    )
    assert "top level" in caught.value.fix


def test_a_type_messages_cannot_be_decoded_into_names_the_subscriber(registry: Registry) -> None:
    def take(message: int) -> None: ...

    registry.add(take, "a")
    with pytest.raises(RegistrationError, match=r"^Subscriber 'take' \(.*\): .*int"):
        registry.resolve(SETTINGS)
