"""``python -m tests.torture [NAME ...] [--long]``; see ``--help``."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from contextlib import ExitStack

from tests.support import ordinary_signals
from tests.support.databases import PostgresServer

from .kept import REPORT, STATE, Kept, commit
from .ledger import HEADER, Result
from .run import Run, Scenario
from .scenarios import SCENARIOS

SEED = 1


def main(arguments: list[str] | None = None) -> int:
    """Run scenarios and print a line for each; 1 if something was lost or happened twice."""
    options = _parse(arguments)
    ordinary_signals.restore()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: end the processes
    chosen = [one for one in SCENARIOS if not options.names or one.name in options.names]
    with ExitStack() as stack:
        session = _Session(options, stack)
        print(f"seed {options.seed}, {session.form}\n{HEADER}")
        outcomes = [session.run(scenario) for scenario in chosen]
    bad = sum(bool(getattr(outcome, "problems", True)) for outcome in outcomes)
    print(f"{len(chosen)} scenarios, {bad} with something wrong")
    return 1 if bad else 0


class _Session:
    """Scenarios one after the other: a database server for all, and a time limit."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack) -> None:
        self._options = options
        self._stack = stack
        self._server: PostgresServer | None = None
        self._deadline = time.monotonic() + options.minutes * 60
        self._kept = Kept()
        self._commit = commit()

    @property
    def form(self) -> str:
        minutes = self._options.minutes
        return f"long form, at most {minutes:g} minutes" if self._options.long else "short form"

    def _postgres(self) -> PostgresServer:
        if self._server is None:
            self._server = self._stack.enter_context(PostgresServer())
        return self._server

    def run(self, scenario: Scenario) -> Result | str:
        """Run one, unless its result is known, and print what came of it."""
        options = self._options
        known = self._kept.find(scenario, options.seed, self._commit)
        if options.long and known and not options.again:
            print(f"{known.outcome}, {known.seconds:.0f} s, known from before", flush=True)
            return known.outcome
        limit = min(scenario.limit, self._deadline - time.monotonic())
        size = scenario.long if options.long else scenario.short
        run = Run(scenario.name, size, options.seed, self._postgres, limit, verbose=True)
        if limit > 0:
            sizes = ", ".join(f"{name} {value:,}" for name, value in size.items())
            print(f"  {scenario.name}: {sizes}; at most {limit:.0f} s", file=sys.stderr)
        began = time.monotonic()
        outcome = _try(scenario, run)
        seconds = time.monotonic() - began
        print(f"{outcome}, {seconds:.0f} s", flush=True)
        if options.long and run.limit > 0:
            result = outcome if isinstance(outcome, Result) else _failed(scenario, outcome)
            self._kept.add(scenario, options.seed, self._commit, result, seconds)
            self._kept.write_report(SCENARIOS)
        return outcome


def _try(scenario: Scenario, run: Run) -> Result | str:
    if run.limit <= 0:
        return f"{scenario.name:34}  not begun: the time is up; the same command goes on here"
    try:
        return scenario.function(run)
    except Exception as error:
        return f"{scenario.name:34}  FAILED: {type(error).__name__}: {error}"


def _failed(scenario: Scenario, outcome: str) -> Result:
    """What is kept of a run that did not come to its counts."""
    return Result(scenario.name, 0, 0, 0, 0, 0, 0.0, problems=[outcome.split(maxsplit=1)[1]])


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description="Kill what can be killed, and count what is lost or happens twice.",
        epilog=f"Scenarios: {', '.join(names)}.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="scenarios to run; default all")
    parser.add_argument(
        "--long",
        action="store_true",
        help=f"the sizes of a nightly run; results are kept in {STATE.name} and reported in "
        f"docs/{REPORT.name}, and what was done on the same commit is not done again",
    )
    parser.add_argument("--again", action="store_true", help="run also what was done already")
    parser.add_argument(
        "--minutes", type=float, default=120, help="longest time for all (default: %(default)g)"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="other random moments")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in names:
            parser.error(f"there is no scenario {name!r}; known: {', '.join(names)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
