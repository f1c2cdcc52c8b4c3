"""Checks the licences of what users install with the package: ``python -m tests.tools.licences``.

Reads the metadata of the installed distributions, from the package on through everything it
needs, with its extra ``all``. Ends with 1 if one has a licence that is not on the list.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import NamedTuple

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "Flask-NatsPubsub"

# Licences that may be used in closed programs without more than a notice, by their SPDX names.
ALLOWED = frozenset(
    [
        "0BSD",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "ISC",
        "MIT",
        "MIT-0",
        "PSF-2.0",
        "Python-2.0",
        "Unlicense",
        "Zlib",
    ]
)

# What may follow WITH: each of these only allows more than the licence before it.
EXCEPTIONS = frozenset({"LLVM-exception"})

# The same licences, as older packages name them in their classifiers.
CLASSIFIERS = frozenset(
    f"License :: OSI Approved :: {name}"
    for name in (
        "Apache Software License",
        "BSD License",
        "ISC License (ISCL)",
        "MIT License",
        "MIT No Attribution License (MIT-0)",
        "Python Software Foundation License",
        "The Unlicense (Unlicense)",
        "zlib/libpng License",
        "Zero-Clause BSD (0BSD)",
    )
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


class Licence(NamedTuple):
    """What a distribution says of its licence; empty where it says nothing."""

    expression: str
    classifiers: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        said = self.expression or "; ".join(self.classifiers) or self.text
        return " ".join(said.split())[:200] or "no licence given"

    @property
    def is_allowed(self) -> bool:
        """Whether what counts is on the list: the expression, else the classifiers, else the text.

        Several classifiers do not say whether one may choose, so each has to be on the list.
        """
        if self.expression or not self.classifiers:
            return allowed(self.expression or self.text)
        return set(self.classifiers) <= CLASSIFIERS


def licence_of(installed: Distribution) -> Licence:
    """Return what the metadata of a distribution says."""
    about = installed.metadata
    trove = [line for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    return Licence(
        about.get("License-Expression") or "",
        # Only the parent of those that name a licence.
        tuple(line for line in trove if line != "License :: OSI Approved"),
        about.get("License") or "",
    )


def allowed(expression: str) -> bool:
    """Whether an SPDX expression can be met with licences of the list alone.

    Of ``OR`` one side is enough, of ``AND`` both are needed. What is no SPDX expression is not
    allowed.
    """
    try:
        words = re.findall(r"[()]|[^\s()]+", canonicalize_license_expression(expression))
    except InvalidLicenseExpression:
        return False
    return _either(words) and not words


def _either(words: list[str]) -> bool:
    """Take alternatives from the front of ``words``; AND binds closer than OR."""
    fine = _both(words)
    while words and words[0] == "OR":
        del words[0]
        fine = _both(words) or fine
    return fine


def _both(words: list[str]) -> bool:
    fine = _one(words)
    while words and words[0] == "AND":
        del words[0]
        fine = _one(words) and fine
    return fine


def _one(words: list[str]) -> bool:
    word = words.pop(0)
    if word == "(":
        fine = _either(words)
        del words[0]  # the bracket that closes it
        return fine
    fine = word in ALLOWED
    if words and words[0] == "WITH":
        _, exception = words.pop(0), words.pop(0)
        fine = fine and exception in EXCEPTIONS
    return fine


def main() -> int:
    """Print name, version and licence of each; return 1 if one is not allowed."""
    refused = 0
    for name in sorted(needed()):
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        licence = licence_of(installed)
        verdict = "" if licence.is_allowed else "   NOT ON THE LIST"
        refused += bool(verdict)
        print(f"{name} {installed.version}: {licence}{verdict}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
