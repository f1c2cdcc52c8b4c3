"""Asks the other processes of an application whether one still needs something of a consumer.

Question and answer go to a subject outside every stream; who needs more than is offered answers,
and all others keep silent. There is no state that could be stale: a process that is gone needs
nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from ...errors import NatsPubsubError
from ..agreement import Needs
from ..wire import frame
from .link import Link

if TYPE_CHECKING:
    from .pull import Pull

#: Seconds to wait for an answer.
WAIT = 1.0


class _Word(msgspec.Struct, omit_defaults=True):
    """The question whether anybody needs more of a consumer than ``offer``; a yes has no offer."""

    question: str
    consumer: tuple[str, str] = ("", "")
    offer: Needs | None = None


class Presence:
    """The questions and answers of one process.

    :param here: returns the pulls of this process.
    """

    def __init__(self, link: Link, subject: str, here: Callable[[], Iterable[Pull]]) -> None:
        self._link = link
        self._subject = subject
        self._here = here
        self._listens = False
        #: By question: whether it came back to us, and the event of a yes to it.
        self._heard: dict[str, bool] = {}
        self._answers: dict[str, asyncio.Event] = {}

    async def listen(self) -> None:
        """Start to answer. Idempotent; without the permission others get no answer."""
        if not self._listens:
            self._listens = True
            with contextlib.suppress(NatsPubsubError):
                await self._link.route(self._subject, self._hear)

    async def is_more_needed(self, one: Pull, offer: Needs) -> bool | None:
        """Whether another pull needs more than ``offer``; None if that cannot be asked."""
        others = (other for other in self._here() if other is not one)
        if any(_lacks(other, one.consumer, offer) for other in others):
            return True
        key, answer = secrets.token_hex(8), asyncio.Event()
        self._answers[key], self._heard[key] = answer, False
        try:
            self._say(_Word(key, one.consumer, offer))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAIT):
                    await answer.wait()
            return answer.is_set() or (False if self._heard[key] else None)
        finally:
            del self._answers[key], self._heard[key]

    def _say(self, word: _Word) -> None:
        self._link.send([frame(self._subject, msgspec.json.encode(word))])

    def _hear(self, at: str, reply: str, headers: Mapping[str, str], data: bytes) -> None:
        word = msgspec.json.decode(data, type=_Word)
        if word.offer is None:
            if word.question in self._answers:
                self._answers[word.question].set()
        elif word.question in self._answers:
            self._heard[word.question] = True
        elif any(_lacks(other, word.consumer, word.offer) for other in self._here()):
            self._say(_Word(word.question))


def _lacks(one: Pull, consumer: tuple[str, str], offer: Needs) -> bool:
    return one.consumer == consumer and not offer.covers(one.needs)
