"""``python -m tests.tools.repeat``: does ``make test`` pass every time, from a fresh clone?

Clones HEAD, again and again, and runs ``make test`` in each clone, every other time beside a
process that keeps a core busy. Prints a line for each run; ends with 1 if one failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUSY = [sys.executable, "-c", "while True: pass"]
SUMMARY = re.compile(r"^=*\s*(\d+ (?:passed|failed|error).*? in [\d.]+s.*?)\s*=*$", re.M)
FAILURE = re.compile(r"^(?:FAILED|ERROR) .*$", re.M)


def main() -> int:
    """Run all; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10, help="how often (default: %(default)s)")
    parser.add_argument(
        "--logs", type=Path, default=None, help="folder for the output of each run (default: new)"
    )
    parser.add_argument("targets", nargs="*", default=["test"], help="for make (default: test)")
    options = parser.parse_args()
    logs = options.logs or Path(tempfile.mkdtemp(prefix="repeat-"))
    logs.mkdir(parents=True, exist_ok=True)
    print(f"{_git('rev-parse', '--short', 'HEAD')}, logs in {logs}", flush=True)
    failures = 0
    for number in range(1, options.runs + 1):
        is_busy = number % 2 == 0
        log = logs / f"{number}.log"
        began = time.monotonic()
        with _busy_core(is_busy):
            code = _run_in_a_clone(options.targets, log)
        failures += code != 0
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        text = log.read_text("utf-8", "replace")
        beside = "beside a busy core" if is_busy else "alone"
        said = SUMMARY.findall(text)[-1:] or ["no summary"]
        verdict = "FAILED" if code else "passed"
        print(f"{number:3}  {verdict}  {minutes}:{seconds:02}  {beside:18}  {said[0]}", flush=True)
        print("".join(f"       {line}\n" for line in FAILURE.findall(text)), end="", flush=True)
    print(f"{options.runs - failures} of {options.runs} passed")
    return 1 if failures else 0


def _run_in_a_clone(targets: list[str], log: Path) -> int:
    with (
        tempfile.TemporaryDirectory(prefix="clone-", ignore_cleanup_errors=True) as folder,
        log.open("wb") as output,
    ):
        _git("clone", "--quiet", "--no-hardlinks", str(ROOT), folder)
        _git("-C", folder, "checkout", "--quiet", "--detach", _git("rev-parse", "HEAD"))
        return subprocess.run(
            ["make", "-C", folder, *targets], stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode


@contextmanager
def _busy_core(is_wanted: bool) -> Iterator[None]:
    if not is_wanted:
        yield
        return
    with subprocess.Popen(BUSY) as busy:
        try:
            yield
        finally:
            busy.kill()


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
