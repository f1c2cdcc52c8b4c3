"""Answers brought to coroutines: all of them, to the right one, with few wake-ups."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from flask_natspubsub import PublishError
from flask_natspubsub.publishing.coroutines import Done, answer_to


class Elsewhere:
    """Somebody in another thread who answers when told to."""

    def __init__(self) -> None:
        self.asked: list[Done] = []

    def answer(self, *results: Any) -> None:
        def run() -> None:
            for done, result in zip(self.asked, results, strict=True):
                done(result)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()


def count_wakes(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., object]]:
    loop, woken = asyncio.get_running_loop(), []
    wake = loop.call_soon_threadsafe

    def counted(callback: Any, *arguments: Any) -> Any:
        woken.append(callback)
        return wake(callback, *arguments)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    return woken


def test_many_answers_take_one_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        woken, other = count_wakes(monkeypatch), Elsewhere()
        waiting = [asyncio.ensure_future(answer_to(other.asked.append)) for _ in range(100)]
        await asyncio.sleep(0)

        other.answer(*range(100))

        assert await asyncio.gather(*waiting) == list(range(100))
        assert len(woken) == 1

    asyncio.run(main())


def test_each_gets_its_own_answer_or_error() -> None:
    async def main() -> None:
        other = Elsewhere()
        waiting = [asyncio.ensure_future(answer_to(other.asked.append)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[1].cancel()

        other.answer("a", "b", PublishError("refused"))

        first, second, third = await asyncio.gather(*waiting, return_exceptions=True)
        assert first == "a"
        assert isinstance(second, asyncio.CancelledError)
        assert str(third) == "refused"

    asyncio.run(main())


def test_an_answer_may_be_there_at_once() -> None:
    for number in (1, 2):  # each in a loop of its own, as async views are
        assert asyncio.run(answer_to(lambda done, number=number: done(number))) == number  # type: ignore[misc, arg-type]


def test_an_answer_for_a_loop_that_has_ended_is_nobodys() -> None:
    other = Elsewhere()

    async def main() -> None:
        task = asyncio.ensure_future(answer_to(other.asked.append))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(main())

    other.answer("late")
