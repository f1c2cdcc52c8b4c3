"""Questions to a server of a cluster that may be between two leaders."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from flask_natspubsub import BrokerError
from flask_natspubsub.brokers.jetstream import broker


class Asked:
    """Answers the question number ``answered``, once all have been asked that there are to be."""

    def __init__(self, answered: int, of: int) -> None:
        self._answered, self._of = answered, of
        self.count = 0
        self._all_asked = asyncio.Event()

    async def __call__(self) -> bytes:
        self.count += 1
        number = self.count
        if number == self._of:
            self._all_asked.set()
        await self._all_asked.wait()
        if number != self._answered:
            await asyncio.Event().wait()
        return b"%d" % number


def first_answer(asked: Asked, again: float = broker.ASK_AGAIN) -> bytes:
    async def main() -> bytes:
        async with asyncio.timeout(30):
            return await broker.first_answer(asked, again=again)

    return asyncio.run(main())


@pytest.mark.parametrize("answered", [1, 2, 3])
def test_a_question_without_an_answer_is_asked_again_and_any_answer_counts(answered: int) -> None:
    asked = Asked(answered, of=3)

    assert first_answer(asked, again=0.05) == b"%d" % answered
    assert asked.count >= 3


def test_what_is_answered_at_once_is_asked_once() -> None:
    asked = Asked(1, of=1)

    assert first_answer(asked) == b"1"
    assert asked.count == 1


def test_a_failure_is_an_answer_and_nothing_is_left_behind() -> None:
    count = 0

    async def main() -> set[asyncio.Task[Any]]:
        lost = asyncio.Event()

        async def ask() -> bytes:
            nonlocal count
            count += 1
            if count == 3:
                lost.set()
            await lost.wait()
            raise BrokerError("the connection was lost")

        with pytest.raises(BrokerError, match="was lost"):
            await broker.first_answer(ask, again=0.05)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(main()) == set()
    assert count >= 3
