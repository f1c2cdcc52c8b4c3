"""What is installed with the package: licences, weaknesses, and what is said when one lacks."""

from __future__ import annotations

import importlib.util
import json

import pytest

from flask_natspubsub import ConfigurationError
from flask_natspubsub.brokers.nats import check_credentials
from flask_natspubsub.settings import Settings
from tests import audit, licences


def test_all_licences_are_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert licences.main() == 0
    assert {"flask", "nats-py", "msgspec", "sqlalchemy"} <= licences.needed()


@pytest.mark.parametrize("licence", ["", "GPL-3.0-only", "MIT AND GPL-2.0-only", "Proprietary"])
def test_other_licences_are_not(licence: str) -> None:
    assert not licences.allowed(licence)


def test_a_weakness_is_a_finding_and_no_answer_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weak = {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
    monkeypatch.setattr(audit, "audit", lambda _: json.dumps({"dependencies": [weak]}))
    assert audit.main() == 1
    assert "a 1: CVE-1, mended in 2" in capsys.readouterr().out

    skipped = {"name": "a", "skip_reason": "not found"}
    for no_answer in ("", json.dumps({"dependencies": [skipped]})):
        monkeypatch.setattr(audit, "audit", lambda _, text=no_answer: text)
        assert audit.main() == 0
        assert "not reachable" in capsys.readouterr().out


@pytest.mark.parametrize("scheme", ["ws", "wss"])
def test_websockets_without_their_package_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    settings = Settings.from_config({"NATSPUBSUB_URLS": f"{scheme}://127.0.0.1:1"}, "shop")

    with pytest.raises(ConfigurationError, match="pip install aiohttp"):
        check_credentials(settings)
