"""What lands on a user's machine."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import flask_natspubsub

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "flask_natspubsub"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def pythons() -> list[str]:
    """The Pythons that this package may be installed for here, one of each minor version."""
    found = [shutil.which(f"python3.{minor}") for minor in range(11, 20)]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found += [sys.executable, *map(str, sorted(pyenv.glob("versions/3.*/bin/python")))]
    say = "import sys; print(sys.version_info >= (3, 11) and '%d.%d' % sys.version_info[:2] or '')"
    starts: dict[str, str] = {}
    for path in filter(None, found):
        done = subprocess.run([path, "-c", say], capture_output=True, text=True, check=False)
        if not done.returncode and done.stdout.strip():
            starts.setdefault(done.stdout.strip(), path)
    return [starts[version] for version in sorted(starts)]


SMOKE = """
from flask import Flask
from flask_natspubsub import NatsPubsub
from flask_natspubsub.testing import TestBroker

app, seen = Flask("shop"), []
pubsub = NatsPubsub(app)
pubsub.subscriber("order.created", name="see")(lambda message: seen.append(message))
with TestBroker(app) as broker, app.app_context():
    pubsub.publish("order.created", {"n": 1})
    assert broker.drain() == 1
assert seen == [{"n": 1}]
"""


@pytest.mark.parametrize("python", pythons())
def test_the_wheel_works_on_each_python_at_hand(wheel, python, tmp_path):
    """In an environment of its own, with what the wheel itself asks for and no more."""
    env, pip = tmp_path / "env", ["-m", "pip", "install", "--quiet"]
    inside = env / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    for command in (
        [python, "-m", "venv", env],
        [inside, *pip, wheel.filename],
        [inside, "-W", "error", "-c", SMOKE],
        [inside, "-m", "flask", "natspubsub", "--help"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr


def info(wheel, name):
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in HOUSE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {path for path in wheel.namelist() if ".dist-info/" not in path}
    assert "flask_natspubsub/py.typed" in packed
    assert packed == wanted


def test_the_wheel_says_who_it_is(wheel):
    metadata = Parser().parsestr(info(wheel, "METADATA"))
    assert metadata["Name"] == "Flask-NatsPubsub"
    assert metadata["Version"] == flask_natspubsub.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_payload().startswith("# Flask-NatsPubsub")


def test_the_wheel_caps_no_dependency(wheel):
    required = Parser().parsestr(info(wheel, "METADATA")).get_all("Requires-Dist")
    assert [one for one in required if "<" in one or "==" in one.partition(";")[0]] == []


def test_the_entry_points_lead_to_something(wheel):
    points = configparser.ConfigParser(delimiters=["="])
    points.read_string(info(wheel, "entry_points.txt"))
    assert points["flask.commands"]["natspubsub"] == "flask_natspubsub.cli:natspubsub"
    assert points["pytest11"]["flask_natspubsub"] == "flask_natspubsub.testing.plugin"
    for section in points.sections():
        for target in points[section].values():
            module, _, attribute = target.partition(":")
            found = __import__(module, fromlist=[attribute or "__name__"])
            assert not attribute or hasattr(found, attribute)
