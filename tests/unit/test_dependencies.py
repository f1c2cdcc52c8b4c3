"""What is installed with the package: licences, weaknesses, and what is said when one lacks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any

import pytest

from flask_natspubsub import ConfigurationError
from flask_natspubsub.brokers.jetstream.credentials import check_credentials
from flask_natspubsub.config.settings import Settings
from tests.tools import audit, licences


def test_all_licences_are_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert licences.main() == 0
    assert {"flask", "nats-py", "msgspec", "sqlalchemy"} <= licences.needed()


@pytest.mark.parametrize(
    "expression",
    [
        "MIT",
        "mit",
        "MIT AND Apache-2.0",
        "MIT OR GPL-3.0-only",
        "GPL-3.0-only or MIT",
        "GPL-2.0-only AND MIT OR BSD-3-Clause",
        "MIT AND (GPL-2.0-only OR (ISC AND Zlib))",
        "Apache-2.0 WITH LLVM-exception",
    ],
)
def test_licences_that_can_be_met(expression: str) -> None:
    assert licences.allowed(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "GPL-3.0-only",
        "GPL-3.0-only WITH GCC-exception-3.1",
        "MIT AND GPL-2.0-only",
        "mit and gpl-2.0-only",
        "GPL-2.0-only AND MIT OR AGPL-3.0-only",
        "(MIT OR BSD-3-Clause) AND GPL-2.0-only",
        "MIT AND (GPL-2.0-only OR (ISC AND MPL-2.0))",
        "Apache-2.0 WITH Swift-exception",
        "Apache-2.0+",
        "LicenseRef-MIT",
        "not MIT",
        "MIT OR",
        "MIT)",
        "The MIT licence does not apply",
        "Proprietary",
    ],
)
def test_licences_that_cannot(expression: str) -> None:
    assert not licences.allowed(expression)


MIT = "License :: OSI Approved :: MIT License"
GPL = "License :: OSI Approved :: GNU General Public License v3 (GPLv3)"


@pytest.mark.parametrize(
    ("lines", "fine"),
    [
        (["License-Expression: MIT", f"Classifier: {GPL}"], True),
        (["License-Expression: GPL-3.0-only", f"Classifier: {MIT}", "License: MIT"], False),
        ([f"Classifier: {MIT}", "License: All rights reserved"], True),
        ([f"Classifier: {MIT}", "Classifier: License :: OSI Approved"], True),
        ([f"Classifier: {MIT}", f"Classifier: {GPL}"], False),
        (["Classifier: License :: OSI Approved"], False),
        (["Classifier: License :: Other/Proprietary License", "License: MIT"], False),
        (["License: Apache-2.0"], True),
        (["License: GNU GPL, not MIT"], False),
        ([], False),
    ],
)
def test_the_expression_counts_then_the_classifiers_then_the_text(
    tmp_path: Path, lines: list[str], fine: bool
) -> None:
    (tmp_path / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", "Name: a", *lines, ""]))

    assert licences.licence_of(PathDistribution(tmp_path)).is_allowed is fine


def ended(code: int, stdout: str = "", stderr: str = "") -> Any:
    """An ``audit`` whose pip-audit ends like this."""
    done = subprocess.CompletedProcess("pip-audit", code, stdout, stderr)
    return lambda _: audit.report_of(done)


def report(*entries: dict[str, Any]) -> str:
    return json.dumps({"dependencies": entries})


WEAK = {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
SOUND = {"name": "flask", "version": "1", "vulns": []}
UNKNOWN = {"name": "b", "skip_reason": "not found"}


def test_a_weakness_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "audit", ended(1, report(WEAK, SOUND)))

    assert audit.main() == 1
    assert "a 1: CVE-1, mended in 2" in capsys.readouterr().out


def test_what_the_service_does_not_know_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "audit", ended(0, report(SOUND, UNKNOWN)))

    assert audit.main() == 0
    out = capsys.readouterr().out
    assert "1 of " in out
    assert "WARNING: sqlalchemy is not known" in out
    assert "flask is not known" not in out


@pytest.mark.parametrize(
    ("code", "stdout", "stderr"),
    [
        (0, report(UNKNOWN), "No known vulnerabilities found"),
        (1, "", "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed\nTip: ..."),
        (1, "", "Traceback\nrequests.exceptions.ConnectionError: HTTPSConnectionPool"),
        (1, "", "Traceback\nrequests.exceptions.ProxyError: HTTPSConnectionPool"),
        (1, "", "requests.exceptions.HTTPError: 503 Server Error\n...\nServiceError"),
    ],
)
def test_a_service_that_cannot_be_reached_passes_loudly(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    stdout: str,
    stderr: str,
) -> None:
    monkeypatch.setattr(audit, "audit", ended(code, stdout, stderr))

    assert audit.main() == 0
    out = capsys.readouterr().out
    assert "not reachable" in out
    assert "NOTHING was looked up" in out


@pytest.mark.parametrize(
    ("code", "stdout", "stderr"),
    [
        (1, "", "Traceback\nTypeError: unexpected"),
        (1, "", "No module named pip_audit"),
        (1, "", "requests.exceptions.HTTPError: 404 Not Found"),
        (2, "", "usage: pip-audit"),
        (0, "", ""),
        (-9, report(SOUND), ""),
        (1, "", "FileNotFoundError: Connection.txt"),
        (0, "not JSON", ""),
        (0, '{"dependencies": [{"name": "a"}]}', ""),
        (0, "[]", ""),
    ],
)
def test_a_pip_audit_that_fails_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    stdout: str,
    stderr: str,
) -> None:
    monkeypatch.setattr(audit, "audit", ended(code, stdout, stderr))

    assert audit.main() == 1
    assert "FAILED: pip-audit" in capsys.readouterr().out


def test_a_pip_audit_that_is_not_there_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the real command line, run by something else than Python."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho crashed >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(audit.sys, "executable", str(broken))

    with pytest.raises(RuntimeError, match="ended with 1:\ncrashed"):
        audit.audit("a==1\n")


@pytest.mark.parametrize("scheme", ["ws", "wss"])
def test_websockets_without_their_package_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    settings = Settings.from_config({"NATSPUBSUB_URLS": f"{scheme}://127.0.0.1:1"}, "shop")

    with pytest.raises(ConfigurationError, match="pip install aiohttp"):
        check_credentials(settings)
