"""``make bench``: ratios against nats-py, FastStream and a raw socket, measured in the same run.

make bench                        all but growth and disk
make bench ARGS="publish"         one part
make bench ARGS="growth"          what must not get slower as there is more of it
make bench ARGS="disk"            what sync_interval: always costs, here
make bench ARGS="--rounds 7"

Without a part, the figures of docs/performance.rst are written too.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from tests.support.servers import NatsServer

from . import consume, disk, growth, outbox, overheads, publish
from .bars import write_pages
from .harness import table, write_json

PARTS = {
    "publish": publish.comparisons,
    "consume": consume.comparisons,
    "outbox": outbox.comparisons,
    "overheads": overheads.comparisons,
    "growth": growth.comparisons,
    "disk": disk.comparisons,
}
#: One takes as long as all others, to fill tables and streams; one says more of a disk than of us.
ASKED_FOR = ("growth", "disk")
OUTPUT = Path(__file__).with_name("results.json")
DOCS = Path(__file__).parents[2] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    usual = [part for part in PARTS if part not in ASKED_FOR]
    parts = arguments.parts or usual
    for name in parts:
        with NatsServer() as server:
            found = PARTS[name](server.url, arguments.rounds)
        print(f"{name}\n{table(found)}\n", flush=True)
        rows = write_json(OUTPUT, name, found)
    if set(parts) >= set(usual):
        write_pages([row for row in rows if row["part"] in usual], DOCS)
    else:
        print(f"docs/performance-table.rst is written when all of these run: {', '.join(usual)}.")


main()
