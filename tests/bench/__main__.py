"""``make bench``: ratios against nats-py and a raw socket, measured in the same run.

make bench                        all
make bench ARGS="publish"         one part
make bench ARGS="--rounds 7"
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from tests.servers import NatsServer

from . import consume, growth, outbox, publish
from .harness import Comparison, table, write_json

PARTS = {
    "publish": publish.comparisons,
    "consume": consume.comparisons,
    "outbox": outbox.comparisons,
    "growth": growth.comparisons,
}
OUTPUT = Path(__file__).with_name("results.json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    results: list[Comparison] = []
    for name in arguments.parts or PARTS:
        with NatsServer() as server:
            found = PARTS[name](server.url, arguments.rounds)
        print(f"{name}\n{table(found)}\n")
        results += found
    write_json(OUTPUT, results)


main()
