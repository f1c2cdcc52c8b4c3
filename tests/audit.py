"""Looks for known weaknesses in what users install with the package: ``python -m tests.audit``.

Ends with 1 if pip-audit finds one. Where the vulnerability service cannot be reached, or gives
no answer in time, it says so and ends with 0: no network is no weakness.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .licences import needed

LIMIT = 90.0


def pins() -> str:
    """Return the installed runtime dependencies as lines of a requirements file."""
    lines = []
    for name in sorted(needed()):
        try:
            lines.append(f"{name}=={version(name)}")
        except PackageNotFoundError:  # for another system
            continue
    return "\n".join(lines) + "\n"


def findings(report: str) -> tuple[list[str], int]:
    """Return a line for each weakness in pip-audit's JSON, and how many packages it looked up.

    A package that the service does not know is skipped by pip-audit, and counts as not looked
    up: an index without data on weaknesses must not pass for a clean one.
    """
    try:
        dependencies = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return [], 0
    looked_up = [entry for entry in dependencies if "skip_reason" not in entry]
    return [
        f"{entry['name']} {entry['version']}: {weakness['id']}, "
        f"mended in {', '.join(weakness['fix_versions']) or 'no version yet'}"
        for entry in looked_up
        for weakness in entry.get("vulns", [])
    ], len(looked_up)


def audit(requirements: str, limit: float = LIMIT) -> str:
    """Return pip-audit's JSON report; empty if there is none in time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text(requirements)
        command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip"]
        command += ["--progress-spinner", "off", "--format", "json", "-r", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return ""
    # Without the service there is no report; what went wrong else has to be seen.
    if not done.stdout and "Connection" not in done.stderr and "timed out" not in done.stderr:
        print(done.stderr[-2000:], file=sys.stderr)
    return done.stdout


def main() -> int:
    """Print what was found; return 1 if that is anything."""
    requirements = pins()
    found, looked_up = findings(audit(requirements))
    if not looked_up:
        print("the vulnerability service is not reachable: nothing was looked up")
        return 0
    print(f"{looked_up} of {requirements.count('==')} packages looked up, {len(found)} weaknesses")
    print("".join(f"{line}\n" for line in found), end="")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
