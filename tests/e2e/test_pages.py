"""Runs the examples of the README and the Compose file of the docs as they are printed.

Only ports and the server's address differ, so that several tests can run at once.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.processes import Child
from tests.support.servers import free_port, nats_server_binary
from tests.support.waiting import eventually

pytestmark = pytest.mark.real_server

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
TIMEOUT = 30


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


@contextmanager
def running(
    command: list[str], folder: Path, name: str, environment: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Run a command until the end of the block; yields the file of its output."""
    path = folder / f"{name}.out"
    if command[0] in ("flask", "gunicorn"):
        command = [sys.executable, "-m", *command]
    with Child(command, path, folder=folder, environment=environment):
        yield path


def said(path: Path, text: str) -> None:
    eventually(lambda: re.search(text, path.read_text("utf-8", "replace")), TIMEOUT, f"no {text!r}")


def ask(url: str, data: str | None = None, method: str | None = None) -> Any:
    body = None if data is None else data.encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, body, headers, method=method)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        return json.load(response)


def curl(line: str, port: int) -> Any:
    """Send the request of a printed curl command."""
    words = shlex.split(line.replace("5000", str(port)))
    url = next(word for word in words if word.startswith("http"))
    data = words[words.index("-d") + 1] if "-d" in words else None
    return ask(url, data, words[words.index("-X") + 1] if "-X" in words else None)


class Typed:
    """A file of the README in an empty folder, and its commands, each in a terminal."""

    def __init__(self, stack: ExitStack, folder: Path, code: str, lines: list[str]) -> None:
        self.port, nats = free_port(), free_port()
        place = f'app.config["NATSPUBSUB_URLS"] = "nats://127.0.0.1:{nats}"'
        start = 'app = Flask("shop")\n'
        assert code.count(start) == 1
        (folder / "shop.py").write_text(code.replace(start, f"{start}{place}\n"))
        self.out: dict[str, Path] = {}
        for line in lines:
            command = shlex.split(line)
            name = command[-1]
            if name == "create-tables":
                done = subprocess.run([sys.executable, "-m", *command], cwd=folder, check=False)
                assert done.returncode == 0
                continue
            if name == "run":
                command += ["--port", str(self.port)]
            self.out[name] = stack.enter_context(running(command, folder, name))
        said(self.out["worker"], " started")
        said(self.out["run"], "Running on")


def printed(block: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the commands of a block, and those with an answer below them."""
    lines = block.splitlines()
    answers = [
        (line[2:], after)
        for line, after in itertools.pairwise(lines)
        if line.startswith("$ ") and not after.startswith("$ ")
    ]
    return [line[2:] for line in lines if line.startswith("$ flask")], answers


def test_the_first_example_prints_what_it_promises(tmp_path: Path) -> None:
    install, order = blocks("console")[:2]
    (((line, answer),), (text, *_)) = printed(order)[1], blocks("text")
    with ExitStack() as stack:
        typed = Typed(stack, tmp_path, blocks("python")[0], printed(install)[0])

        got = curl(line, typed.port)

        assert got.keys() == json.loads(answer).keys()
        said(typed.out["worker"], "handled")
        lines = typed.out["worker"].read_text().splitlines()[-2:]
    promised = text.replace("5d0b7c1e", got["event_id"][-8:]).splitlines()
    assert json.loads(answer)["event_id"].endswith("5d0b7c1e"), "the README fits itself"
    assert [without_time(one) for one in lines] == [without_time(one) for one in promised]


def without_time(line: str) -> str:
    return re.sub(r"^\d{4}-\S+ \S+|\d+\.\d ms", "", line)


def test_the_second_example_prints_what_it_promises(tmp_path: Path) -> None:
    commands, answers = printed(blocks("console")[2])
    (first, created), (second, shown) = answers
    with ExitStack() as stack:
        typed = Typed(stack, tmp_path, blocks("python")[1], commands)

        assert curl(first, typed.port) == json.loads(created)
        eventually(lambda: curl(second, typed.port) == json.loads(shown), TIMEOUT)


SHOP = """
from flask import Flask, request
from flask_natspubsub import NatsPubsub

pubsub = NatsPubsub()


def create_app():
    app = Flask("shop")
    app.config.from_prefixed_env()
    pubsub.init_app(app)

    @app.post("/orders")
    def create_order():
        pubsub.publish("order.created", request.get_json())
        return {}, 202

    return app


@pubsub.subscriber("order.created")
def confirm(message):
    print("confirmed", message["order_id"], flush=True)
"""


def compose_file() -> dict[str, Any]:
    page = (ROOT / "docs" / "worker.rst").read_text("utf-8")
    (text,) = re.findall(r"^.. code-block:: yaml\n\n((?:   .*\n|\n)+)", page, re.M)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_the_services_of_the_compose_file_work_together(tmp_path: Path) -> None:
    compose = compose_file()
    services = compose["services"]
    assert set(services) == {"nats", "web", "worker"}
    (volume, place) = services["nats"]["volumes"][0].split(":")
    assert volume in compose["volumes"]
    (tmp_path / "shop.py").write_text(SHOP)
    nats, web = free_port(), free_port()

    def environment(service: dict[str, Any]) -> dict[str, str]:
        given = {name: str(value) for name, value in service["environment"].items()}
        assert given["FLASK_NATSPUBSUB_URLS"] == "nats://nats:4222", "the name of the service"
        return {**given, "FLASK_NATSPUBSUB_URLS": f"nats://127.0.0.1:{nats}"}

    server = [word.replace(place, str(tmp_path / "data")) for word in services["nats"]["command"]]
    site = services["web"]["command"].replace("0.0.0.0:8000", f"127.0.0.1:{web}")
    assert services["web"]["ports"] == ["8000:8000"]
    with ExitStack() as stack:
        run = stack.enter_context
        run(running([nats_server_binary(), *server, "-p", str(nats)], tmp_path, "nats"))
        for name, command in (("web", site), ("worker", services["worker"]["command"])):
            run(running(shlex.split(command), tmp_path, name, environment(services[name])))
        said(tmp_path / "worker.out", " started")
        said(tmp_path / "web.out", "Booting worker")

        ask(f"http://127.0.0.1:{web}/orders", '{"order_id": 7}')

        said(tmp_path / "worker.out", "confirmed 7")
    grace = services["worker"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > 30, "NATSPUBSUB_SHUTDOWN_TIMEOUT, and a few seconds"


def test_the_image_of_the_compose_file_is_a_server_that_will_do() -> None:
    image, _, version = compose_file()["services"]["nats"]["image"].partition(":")
    assert image == "nats"
    assert tuple(map(int, version.split("."))) >= (2, 11)
