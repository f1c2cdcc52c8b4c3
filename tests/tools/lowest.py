"""Prints, as constraints for pip, the lowest version that pyproject.toml allows of each dependency.

python -m tests.tools.lowest > constraints.txt
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
GROUP = "lowest"
#: A requirement, such as ``psycopg[binary]>=3.2``; own extras and plain names have no version.
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?>=([^;,\s]+)")


def requirements(project: dict[str, Any]) -> Iterator[str]:
    """Return what the package itself, its extras and the group ask for."""
    yield from project["project"]["dependencies"]
    for extra in project["project"]["optional-dependencies"].values():
        yield from extra
    yield from project["dependency-groups"][GROUP]


def constraints(wanted: Iterator[str]) -> list[str]:
    """Return ``name==version`` for each that has a lowest version."""
    found = map(_REQUIREMENT.match, wanted)
    return sorted({f"{one[1].lower()}=={one[2]}" for one in found if one})


if __name__ == "__main__":
    print("\n".join(constraints(requirements(tomllib.loads(PROJECT.read_text("utf-8"))))))
