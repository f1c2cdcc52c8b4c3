from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flask_natspubsub.middleware import Middleware, compose, is_async
from flask_natspubsub.subscribing.context import CURRENT, MessageContext, current_message


def noting(log: list[str], name: str) -> Middleware:
    def note(subject: Any, call_next: Callable[..., Any]) -> Any:
        log.append(f"{name} in")
        result = call_next()
        log.append(f"{name} out")
        return result

    return note


def test_without_middleware_the_handler_is_called() -> None:
    assert compose([], lambda subject: f"handled {subject}")("x") == "handled x"


def test_the_first_middleware_is_the_outermost() -> None:
    log: list[str] = []

    def handle(subject: str) -> str:
        log.append(f"handle {subject}")
        return "result"

    run = compose([noting(log, "a"), noting(log, "b")], handle)
    assert run("x") == "result"
    assert log == ["a in", "b in", "handle x", "b out", "a out"]


def test_the_composed_function_can_run_again() -> None:
    log: list[str] = []
    run = compose([noting(log, "a")], lambda subject: subject)
    assert [run(1), run(2)] == [1, 2]
    assert log == ["a in", "a out"] * 2


def test_middleware_passes_another_subject_inwards() -> None:
    run = compose([lambda subject, call_next: call_next(subject + 1)], lambda subject: subject)
    assert run(1) == 2


def test_middleware_changes_the_result() -> None:
    run = compose([lambda _subject, call_next: call_next() * 2], lambda subject: subject)
    assert run(3) == 6


def test_middleware_that_does_not_call_on_skips_the_handler() -> None:
    handled: list[Any] = []
    run = compose([lambda _subject, _call_next: "skipped"], handled.append)
    assert run("x") == "skipped"
    assert handled == []


def test_errors_pass_outwards_and_can_be_caught() -> None:
    def fail(_subject: Any) -> None:
        raise ValueError("no stock")

    def rescue(_subject: Any, call_next: Callable[..., Any]) -> str:
        try:
            call_next()
        except ValueError as error:
            return f"rescued {error}"
        return "nothing to rescue"

    assert compose([rescue], fail)("x") == "rescued no stock"
    with pytest.raises(ValueError, match="no stock"):
        compose([noting([], "a")], fail)("x")


async def shout(subject: str) -> str:
    await asyncio.sleep(0)
    return subject.upper()


def test_plain_middleware_hands_on_an_async_handlers_awaitable() -> None:
    result = compose([noting([], "a")], shout)("x")
    assert inspect.isawaitable(result)
    assert asyncio.run(_await(result)) == "X"


async def _await(awaitable: Any) -> Any:
    return await awaitable


async def bracket(_subject: Any, call_next: Callable[..., Any]) -> str:
    return f"[{await call_next()}]"


@pytest.mark.parametrize("handler", [shout, str.upper], ids=["async", "plain"])
def test_async_middleware_awaits_any_handler(handler: Callable[[str], Any]) -> None:
    run = compose([bracket, noting([], "a"), bracket], handler)
    assert asyncio.run(_await(run("x"))) == "[[X]]"


def test_async_middleware_passes_another_subject_inwards() -> None:
    async def double(subject: str, call_next: Callable[..., Any]) -> Any:
        return await call_next(subject * 2)

    assert asyncio.run(_await(compose([double], shout)("x"))) == "XX"


class AsyncObject:
    async def __call__(self, message: Any) -> None: ...

    async def method(self, message: Any) -> None: ...


class PlainObject:
    def __call__(self, message: Any) -> None: ...


@pytest.mark.parametrize(
    "function",
    [
        shout,
        functools.partial(shout),
        AsyncObject(),
        AsyncObject().method,
        functools.partial(AsyncObject()),
        functools.partial(AsyncObject().method, 1),
    ],
)
def test_async_callables_are_recognised(function: Callable[..., Any]) -> None:
    assert is_async(function)


@pytest.mark.parametrize("function", [str.upper, print, PlainObject(), functools.partial(print)])
def test_plain_callables_are_recognised(function: Callable[..., Any]) -> None:
    assert not is_async(function)


def a_context(**changes: Any) -> MessageContext:
    moment = dt.datetime(2025, 1, 2, tzinfo=dt.UTC)
    context = MessageContext(
        event_id="e1",
        topic="order.created",
        subject="test.shop.order.created",
        stream="test-events-stream",
        sequence=7,
        trace_id="t1",
        correlation_id=None,
        causation_id=None,
        producer="shop",
        occurred_at=moment,
        published_at=moment,
        attempt=1,
        headers={},
        raw=b"{}",
        envelope={},
        subscriber="send",
    )
    return dataclasses.replace(context, **changes)


@contextlib.contextmanager
def handling(context: MessageContext) -> Iterator[MessageContext]:
    token = CURRENT.set(context)
    try:
        yield context
    finally:
        CURRENT.reset(token)


def test_current_message_is_the_context_while_handling() -> None:
    with handling(a_context()) as context:
        assert current_message.event_id == "e1"
        assert current_message == context


def test_current_message_is_restored_after_a_nested_message_and_an_error() -> None:
    with handling(a_context(event_id="outer")):
        with contextlib.suppress(ValueError), handling(a_context(event_id="inner")):
            assert current_message.event_id == "inner"
            raise ValueError("boom")
        assert current_message.event_id == "outer"


def test_current_message_outside_a_handler_says_where_it_works() -> None:
    assert bool(current_message) is False
    with pytest.raises(RuntimeError, match="No message is being handled here"):
        _ = current_message.event_id


def test_current_message_does_not_leak_into_other_threads() -> None:
    seen: list[bool] = []
    with handling(a_context()):
        thread = threading.Thread(target=lambda: seen.append(bool(current_message)))
        thread.start()
        thread.join(5)
    assert seen == [False]


def test_a_context_takes_no_unknown_attribute() -> None:
    with pytest.raises(AttributeError):
        a_context().evnt_id = "x"  # type: ignore[attr-defined]
