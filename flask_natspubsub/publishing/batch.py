"""Several messages, sent together."""

from __future__ import annotations

import types
from typing import Any, Self

from .draft import Prepared, PublishReceipt, drafts_for
from .publisher import Publisher, fail


class Batch:
    """Collects messages in a ``with`` block and sends them together at its end.

    Each ``publish`` checks and encodes at once, so a bad message raises where it is made.
    Nothing is sent if the block raises.
    """

    def __init__(self, publisher: Publisher, timeout: float | None = None) -> None:
        #: One receipt for each message, in order, once the block has ended.
        self.receipts: list[PublishReceipt] = []
        self._publisher = publisher
        self._timeout = timeout
        self._prepared: list[Prepared] = []

    def publish(self, topic: str | list[str], message: Any, **options: Any) -> None:
        """Add a message; takes what ``NatsPubsub.publish`` takes, but for ``timeout``."""
        drafts = drafts_for(topic, message, **options)
        self._prepared += self._publisher.prepare_all(drafts)

    def __len__(self) -> int:
        return len(self._prepared)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if kind is None:
            self.receipts = self._publisher.send(self._prepared, self._timeout)
        elif isinstance(error, Exception):
            fail(self._prepared, error)
