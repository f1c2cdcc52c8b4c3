"""``python -m tests.torture [NAME ...] [--long]``; see ``--help``."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from contextlib import ExitStack

from ..databases import PostgresServer
from .ledger import HEADER, Result
from .run import Run, Scenario
from .scenarios import SCENARIOS

SEED = 1


def main(arguments: list[str] | None = None) -> int:
    """Run scenarios and print a line for each; 1 if something was lost or happened twice."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: end the processes
    chosen = [one for one in SCENARIOS if not options.names or one.name in options.names]
    bad = 0
    with ExitStack() as stack:
        servers: list[PostgresServer] = []

        def postgres() -> PostgresServer:
            if not servers:
                servers.append(stack.enter_context(PostgresServer()))
            return servers[0]

        print(f"seed {options.seed}, {'long' if options.long else 'short'} form\n{HEADER}")
        for scenario in chosen:
            size = scenario.long if options.long else scenario.short
            run = Run(scenario.name, size, options.seed, postgres, scenario.limit, verbose=True)
            began = time.monotonic()
            result = _try(scenario, run)
            print(f"{result}, {time.monotonic() - began:.0f} s", flush=True)
            bad += bool(getattr(result, "problems", True))
    print(f"{len(chosen)} scenarios, {bad} with something wrong")
    return 1 if bad else 0


def _try(scenario: Scenario, run: Run) -> Result | str:
    try:
        return scenario.function(run)
    except Exception as error:
        return f"{scenario.name:34}  FAILED: {type(error).__name__}: {error}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description="Kill what can be killed, and count what is lost or happens twice.",
        epilog=f"Scenarios: {', '.join(names)}.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="scenarios to run; default all")
    parser.add_argument("--long", action="store_true", help="the sizes of a nightly run")
    parser.add_argument("--seed", type=int, default=SEED, help="other random moments")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in names:
            parser.error(f"there is no scenario {name!r}; known: {', '.join(names)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
