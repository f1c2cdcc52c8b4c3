"""The base of everything that tests start and must stop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Managed(ABC):
    """Something that is started and closed; a context manager."""

    @abstractmethod
    def start(self) -> None:
        """Start, and wait until it can be used."""

    @abstractmethod
    def close(self) -> None:
        """Stop it and remove its files; works also after a start that failed halfway."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
