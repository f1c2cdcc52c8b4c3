"""Checks the licences of what users install with the package: ``python -m tests.licences``.

Reads the metadata of the installed distributions, from the package on through everything it
needs, with its extra ``all``. Ends with 1 if one has a licence that is not on the list.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "Flask-NatsPubsub"

# Licences that may be used in closed programs without more than a notice.
ALLOWED = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|PSF|PSF-2\.0|Python Software Foundation|ISC|Unlicense|Zlib)\b", re.I
)


def needed(root: str = ROOT, extras: frozenset[str] = frozenset({"all"})) -> set[str]:
    """Return the names of what is installed because of ``root``, without itself."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(canonicalize_name(root), extras)]
    while todo:
        entry = todo.pop()
        if entry not in seen:
            seen.add(entry)
            todo += _requirements(*entry)
    return {str(name) for name, _ in seen} - {canonicalize_name(root)}


def _requirements(name: str, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:  # for another system, or an extra that is not installed
        return
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def licence_of(installed: Distribution) -> str:
    """Return what the distribution says of its licence, on one line; empty if it says nothing."""
    about = installed.metadata
    trove = [line for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    said = about.get("License-Expression") or "; ".join(trove) or about.get("License") or ""
    return " ".join(said.split())[:200]


def allowed(licence: str) -> bool:
    """Whether every part that has to be kept to is on the list."""
    parts = re.split(r"\s+AND\s+", licence)
    return all(ALLOWED.search(part) for part in parts)


def main() -> int:
    """Print name, version and licence of each; return 1 if one is not allowed."""
    refused = 0
    for name in sorted(needed()):
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        licence = licence_of(installed)
        verdict = "" if allowed(licence) else "   NOT ON THE LIST"
        refused += bool(verdict)
        print(f"{name} {installed.version}: {licence or 'no licence given'}{verdict}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
