"""Processes: a forked child has a connection of its own and leaves its parent's alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count as numbers
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_natspubsub import NatsPubsub
from tests.conftest import MakePubsub
from tests.support.forking import in_child
from tests.support.processes import Child
from tests.support.servers import NatsServer, free_port
from tests.support.waiting import eventually

from .helpers import at_most, count, event_ids, stored

pytestmark = [
    pytest.mark.real_server,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    # Python 3.12 warns of forking with threads around: the very thing that is tested here.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


class MonitoredServer(NatsServer):
    """A server that can be asked for its connections."""

    def __init__(self) -> None:
        super().__init__("http: 127.0.0.1:-1")

    def connections(self, state: str = "open") -> Counter[str]:
        """How many connections there are of each name."""
        ports = json.loads(self._ports_file().read_text())
        url = f"{ports['monitoring'][0]}/connz?state={state}&limit=10000"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return Counter(one.get("name", "") for one in json.load(answer)["connections"])


@pytest.fixture
def server() -> Iterator[MonitoredServer]:
    with MonitoredServer() as started:
        yield started


@pytest.fixture
def shop(make_pubsub: MakePubsub, server: MonitoredServer) -> NatsPubsub:
    return make_pubsub(urls=server.url)


def publish_some(pubsub: NatsPubsub, name: str, times: int) -> list[int]:
    receipts = [pubsub.publish("a", {}, event_id=f"{name}-{n}") for n in range(times)]
    assert not any(receipt.duplicate for receipt in receipts)
    return [receipt.sequence or 0 for receipt in receipts]


def test_parent_and_child_publish_over_connections_of_their_own(
    shop: NatsPubsub, server: MonitoredServer
) -> None:
    publish_some(shop, "before", 3)

    for round_number in range(5):
        child = in_child(lambda name=f"child{round_number}": publish_some(shop, name, 10))
        parent = publish_some(shop, f"parent{round_number}", 10)
        assert len({*child, *parent}) == 20

    ids = event_ids(stored(shop))
    assert len(ids) == len(set(ids)) == 103
    assert server.connections() == {f"shop-{os.getpid()}": 1}
    assert set(server.connections("any").values()) == {1}
    assert len(server.connections("any")) == 6


def test_a_child_of_a_parent_that_has_not_connected_yet(shop: NatsPubsub) -> None:
    assert in_child(lambda: publish_some(shop, "child", 3)) == [1, 2, 3]
    assert publish_some(shop, "parent", 1) == [4]


def test_a_grandchild(shop: NatsPubsub) -> None:
    publish_some(shop, "parent", 1)

    def child() -> Any:
        mine = publish_some(shop, "child", 1)
        return mine + in_child(lambda: publish_some(shop, "grandchild", 1))

    assert in_child(child) == [2, 3]
    assert publish_some(shop, "parent-again", 1) == [4]


def test_what_the_child_does_to_its_extension_is_not_done_to_the_parents(
    shop: NatsPubsub, server: MonitoredServer
) -> None:
    publish_some(shop, "before", 1)
    broker = shop.state().broker()

    def child() -> list[str]:
        assert not broker.is_connected
        assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
        publish_some(shop, "child", 1)
        names = sorted(thread.name for thread in threading.enumerate())
        shop.shutdown()
        assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
        return names

    assert in_child(child) == ["MainThread", "natspubsub-shop"]
    assert broker.is_connected
    assert publish_some(shop, "after", 1) == [3]
    assert server.connections("any")[f"shop-{os.getpid()}"] == 1


def test_what_the_parent_has_in_flight_is_the_parents_alone(
    shop: NatsPubsub, server: MonitoredServer
) -> None:
    publish_some(shop, "before", 1)
    server.pause()
    futures = [shop.publish_nowait("a", {}, event_id=f"e{n}", timeout=20) for n in range(50)]

    in_child(lambda: None)
    server.resume()

    assert [future.result(10).sequence for future in futures] == list(range(2, 52))
    assert not any(future.result(0).duplicate for future in futures)


def test_forks_in_the_middle_of_publishing_threads(
    shop: NatsPubsub, server: MonitoredServer
) -> None:
    stop = threading.Event()

    def publish_on(thread: int) -> int:
        for n in numbers():
            if stop.is_set():
                return n
            shop.publish("a", {}, event_id=f"thread{thread}-{n}")
        raise AssertionError

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(publish_on, thread) for thread in range(4)]
        try:
            for number in range(30):
                in_child(lambda name=f"child{number}": publish_some(shop, name, 3))
        finally:
            stop.set()
        published = sum(one.result(10) for one in running)

    ids = event_ids(stored(shop))
    assert len(ids) == len(set(ids)) == published + 90
    assert server.connections()[f"shop-{os.getpid()}"] == 1


def test_a_script_that_forks_and_ends_normally(server: MonitoredServer, env: str) -> None:
    script = f"""
import os, sys
from flask import Flask
from flask_natspubsub import NatsPubsub
app = Flask("shop")
app.config.update(NATSPUBSUB_URLS={server.url!r}, NATSPUBSUB_ENV={env!r})
pubsub = NatsPubsub(app)
pubsub.publish("a", {{}})
pid = os.fork()
for n in range(5):
    pubsub.publish("a", {{}})
pubsub.publish_nowait("a", {{}})
if pid == 0:
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert pubsub.publish("a", {{}}).sequence == 14
"""
    with at_most(15):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", script],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def publish_in_process(pubsub: NatsPubsub | None, url: str, env: str, name: str) -> None:
    """What a process of ``multiprocessing`` runs; it has nothing but what it is given."""
    if pubsub is None:
        app = Flask("shop")
        app.config.update(NATSPUBSUB_URLS=url, NATSPUBSUB_ENV=env)
        pubsub = NatsPubsub(app)
        publish_some(pubsub, name, 5)
        pubsub.shutdown()
    else:
        publish_some(pubsub, name, 5)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(shop: NatsPubsub, server: MonitoredServer, env: str, method: str) -> None:
    publish_some(shop, "before", 1)
    context: Any = multiprocessing.get_context(method)
    inherited = shop if method == "fork" else None
    processes = [
        context.Process(target=publish_in_process, args=(inherited, server.url, env, f"p{n}"))
        for n in range(2)
    ]

    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    exit_codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
        process.close()

    assert exit_codes == [0, 0]
    assert publish_some(shop, "after", 1) == [12]


PRELOADED = """
import os
from flask import Flask
from flask_natspubsub import NatsPubsub

app = Flask("shop")
app.config.from_prefixed_env()
pubsub = NatsPubsub(app)
pubsub.publish("started", {}, event_id="master")


@app.post("/<event_id>")
def publish(event_id):
    pubsub.publish("a", {}, event_id=event_id)
    return str(os.getpid())
"""


# A worker that gets SIGTERM before this point takes it for its parent's, and lives on.
HOOKS = """
def post_worker_init(worker):
    with open("ready", "a") as file:
        print(worker.pid, file=file)
"""


@pytest.mark.parametrize("worker", ["sync", "gthread"])
def test_gunicorn_with_a_connection_made_before_it_forks(
    shop: NatsPubsub, server: MonitoredServer, env: str, tmp_path: Path, worker: str
) -> None:
    (tmp_path / "shop.py").write_text(PRELOADED)
    (tmp_path / "gunicorn.conf.py").write_text(HOOKS)
    ready = tmp_path / "ready"
    port = free_port()
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "gunicorn", "shop:app"]
    command += ["--preload", "--workers", "4", "--bind", f"127.0.0.1:{port}", "--no-control-socket"]
    command += ["--worker-class", worker, *(["--threads", "4"] if worker == "gthread" else [])]
    variables = {"FLASK_NATSPUBSUB_URLS": server.url, "FLASK_NATSPUBSUB_ENV": env}
    gunicorn = Child(command, tmp_path / "log", folder=tmp_path, environment=variables)

    def post(event_id: str) -> str:
        url = f"http://127.0.0.1:{port}/{event_id}"
        request = urllib.request.Request(url, method="POST", headers={"Connection": "close"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    def is_ready() -> bool:
        assert not gunicorn.has_ended, gunicorn.log
        return ready.exists() and len(ready.read_text().splitlines()) == 4

    try:
        eventually(is_ready, 20, "gunicorn does not start")
        with ThreadPoolExecutor(8) as pool:
            pids = list(pool.map(post, (f"e{n}" for n in range(100))))
        connections = server.connections()
    finally:
        try:
            code = gunicorn.stop()
        finally:
            gunicorn.kill()

    assert code == 0
    assert Counter(event_ids(stored(shop))) == Counter(["master", *(f"e{n}" for n in range(100))])
    processes = {gunicorn.pid, *map(int, pids)}
    assert len(processes) > 2  # more than one worker has had its turn
    assert {name: connections[name] for name in (f"shop-{pid}" for pid in processes)} == {
        f"shop-{pid}": 1 for pid in processes
    }
    eventually(lambda: not (server.connections().keys() - {f"shop-{os.getpid()}"}))


def test_forking_costs_a_child_no_more_than_a_connection(shop: NatsPubsub) -> None:
    publish_some(shop, "before", 1)

    def child() -> float:
        began = time.monotonic()
        publish_some(shop, "child", 1)
        return time.monotonic() - began

    assert in_child(child) < 2
    assert count(shop) == 2
