"""The way of one message is the one that CONTRIBUTING shows, and crosses no more files than now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import flask_natspubsub
from tests.support.journey import Journey, Site, watched
from tests.support.servers import NatsServer

pytestmark = pytest.mark.real_server

HOUSE = Path(flask_natspubsub.__file__).parent
CONTRIBUTING = (HOUSE.parent / "CONTRIBUTING.md").read_text("utf-8")
#: What is there today; a change may lower them, not raise them.
MAX_FILES, MAX_MOVES = 37, 130


def reading_path() -> list[str]:
    (block,) = re.findall(r"<!-- way -->\n```\n(.*?)```", CONTRIBUTING, re.DOTALL)
    return re.findall(r"^(\S+\.py)", block, re.MULTILINE)


def test_one_message_takes_the_way_that_contributing_shows(tmp_path: Path) -> None:
    ways: list[Journey] = []
    with watched(), NatsServer() as server:
        site = Site(server, tmp_path)
        try:
            for _ in range(6):
                ways.append(Journey([call for way in site.send() for call in way]))
        finally:
            site.close()
    warm = ways[2:]  # the first ones make what is made once

    assert any([file for file in way.files if file in reading_path()] == reading_path()
               for way in warm), warm[-1].files  # fmt: skip
    assert min(len(way.files) for way in warm) <= MAX_FILES
    assert min(way.moves for way in warm) <= MAX_MOVES


def test_contributing_shows_every_room() -> None:
    (block,) = re.findall(r"<!-- rooms -->\n```\n(.*?)```", CONTRIBUTING, re.DOTALL)
    shown = set(re.findall(r"^([a-z/]+)/ ", block, re.MULTILINE))
    rooms = {path.parent.relative_to(HOUSE).as_posix() for path in HOUSE.rglob("__init__.py")}
    assert shown == rooms - {"."}


def test_files_that_contributing_names_are_there() -> None:
    answers = CONTRIBUTING.partition("| Where is")[2].partition("The words used")[0]
    named = reading_path() + re.findall(r"`([a-z_/]+\.py)`", answers)
    assert len(named) >= 13
    assert [name for name in named if not (HOUSE / name).exists()] == []
