"""Looks for known vulnerabilities of the dependencies: ``python -m tests.tools.audit``.

Ends with 1 if pip-audit finds one, and if pip-audit itself fails. Only where the vulnerability
service cannot be reached, or gives no answer in time, it says so and ends with 0: no network is
no weakness.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.tools.licences import needed

LIMIT = 90.0

# How pip-audit, and requests below it, say that the service was not reached or does not serve.
_UNREACHABLE = re.compile(
    r"requests\.exceptions\.(ProxyError|ConnectionError|ConnectTimeout|ReadTimeout|SSLError):"
    r"|requests\.exceptions\.HTTPError: (403|407|429|5\d\d) "
    r"|Could not connect to PyPI's vulnerability feed|PyPI is not redirecting properly"
)


class Unreachable(Exception):
    """The vulnerability service gave no answer: says nothing of the dependencies."""


def pins() -> str:
    """Return the installed runtime dependencies as lines of a requirements file."""
    lines = []
    for name in sorted(needed()):
        try:
            lines.append(f"{name}=={version(name)}")
        except PackageNotFoundError:  # for another system
            continue
    return "\n".join(lines) + "\n"


def findings(report: str) -> tuple[list[str], list[str]]:
    """Return a line for each weakness in pip-audit's JSON, and the names it looked up.

    A package that the service does not know is skipped by pip-audit, and counts as not looked
    up: an index without data on weaknesses must not pass for a clean one.

    :raises RuntimeError: it is no such report.
    """
    try:
        looked_up = [entry for entry in json.loads(report)["dependencies"] if _was_looked_up(entry)]
        return [
            f"{entry['name']} {entry['version']}: {weakness['id']}, "
            f"mended in {', '.join(weakness['fix_versions']) or 'no version yet'}"
            for entry in looked_up
            for weakness in entry["vulns"]
        ], [entry["name"] for entry in looked_up]
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"pip-audit's report cannot be read: {error!r}") from None


def _was_looked_up(entry: dict[str, object]) -> bool:
    return "skip_reason" not in entry


def audit(requirements: str, limit: float = LIMIT) -> str:
    """Return pip-audit's JSON report.

    :raises Unreachable: the service could not be asked, or not in ``limit`` seconds.
    :raises RuntimeError: pip-audit failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text(requirements)
        command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip"]
        command += ["--progress-spinner", "off", "--format", "json", "-r", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            raise Unreachable(f"no answer within {limit:.0f} s") from None
    return report_of(done)


def report_of(done: subprocess.CompletedProcess[str]) -> str:
    """Return the report of a pip-audit that has ended; see ``audit``.

    It ends with 0, or with 1 both when it has found something and when it has failed: then
    there is no report.
    """
    if done.returncode in (0, 1) and done.stdout.strip():
        return done.stdout
    reason = _UNREACHABLE.search(done.stderr)
    if done.returncode == 1 and reason:
        raise Unreachable(reason[0].rstrip(": "))
    raise RuntimeError(f"pip-audit ended with {done.returncode}:\n{done.stderr[-2000:]}")


def main() -> int:
    """Print what was found; return 1 if that is anything, or if it cannot be told."""
    requirements = pins()
    try:
        found, looked_up = findings(audit(requirements))
    except Unreachable as reason:
        return _nothing_known(str(reason))
    except RuntimeError as problem:
        print(f"FAILED: {problem}")
        return 1
    wanted = re.findall(r"(?m)^(.+)==", requirements)
    if not looked_up:
        return _nothing_known("it knows none of the packages")
    print(f"{len(looked_up)} of {len(wanted)} packages looked up, {len(found)} weaknesses")
    unknown = sorted(set(wanted) - set(looked_up))
    print("".join(f"WARNING: {name} is not known to the service\n" for name in unknown), end="")
    print("".join(f"{line}\n" for line in found), end="")
    return 1 if found else 0


def _nothing_known(reason: str) -> int:
    print("!" * 80)
    print(f"WARNING: the vulnerability service is not reachable ({reason}).")
    print("NOTHING was looked up: this run says nothing about weaknesses.")
    print("!" * 80)
    return 0


if __name__ == "__main__":
    sys.exit(main())
