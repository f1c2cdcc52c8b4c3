"""Headers of a message; a header may have several values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping


class Headers(dict[str, str]):
    """A dict of headers. If a header was sent more than once, the dict has its first value.

    ``getlist`` returns all values. Setting or deleting a header replaces or removes all of them.
    """

    __slots__ = ("_several",)

    def __init__(self, values: Mapping[str, str] | Iterable[tuple[str, str]] = ()) -> None:
        super().__init__()
        self._several: dict[str, list[str]] = {}
        for name, value in pairs_of(values) if isinstance(values, Mapping) else values:
            self.add(name, value)

    def add(self, name: str, value: str) -> None:
        """Add a value to those that the header already has."""
        if name in self:
            self._several.setdefault(name, [self[name]]).append(value)
        else:
            self[name] = value

    def getlist(self, name: str) -> list[str]:
        """Return all values of a header in the order they were sent; an empty list if absent."""
        return list(self._several.get(name) or ([self[name]] if name in self else []))

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield each name with each of its values."""
        for name, value in self.items():
            for one in self._several.get(name) or (value,):
                yield name, one

    def __setitem__(self, name: str, value: str) -> None:
        self._several.pop(name, None)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self._several.pop(name, None)
        super().__delitem__(name)

    def __or__(self, other: Mapping[str, str]) -> Headers:  # type: ignore[override]
        joined = Headers(self)
        for name in other:
            joined._several.pop(name, None)
            dict.pop(joined, name, None)
        for name, value in pairs_of(other):
            joined.add(name, value)
        return joined

    def __reduce__(self) -> tuple[type[Headers], tuple[list[tuple[str, str]]]]:
        return Headers, (list(self.pairs()),)


def pairs_of(headers: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Return the pairs of name and value, for ``Headers`` and for other mappings."""
    pairs = getattr(headers, "pairs", None)
    return headers.items() if pairs is None else pairs()


def for_json(headers: Mapping[str, str]) -> dict[str, str | list[str]]:
    """Return headers for JSON: a string, or a list if the header was sent more than once."""
    values: dict[str, list[str]] = {}
    for name, value in pairs_of(headers):
        values.setdefault(name, []).append(value)
    return {name: found if len(found) > 1 else found[0] for name, found in values.items()}
