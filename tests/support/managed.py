"""What tests start has to be gone at the end, whatever goes wrong."""

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
        """End it and remove what it has left, also if it was started only in part."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
