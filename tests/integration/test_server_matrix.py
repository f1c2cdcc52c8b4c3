"""The web servers people use: every publish arrives, one connection a process, a clean stop."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from flask_natspubsub import NatsPubsub
from tests.conftest import MakePubsub
from tests.support.processes import Child
from tests.support.servers import free_port
from tests.support.waiting import eventually

from .helpers import event_ids, stored
from .test_fork import MonitoredServer

pytestmark = [
    pytest.mark.real_server,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="these servers fork"),
]

SITE = "tests.integration.server_site"
PYTHON = [sys.executable, "-W", "ignore::DeprecationWarning"]
UWSGI = shutil.which("uwsgi", path=str(Path(sys.executable).parent))
GUNICORN = [*PYTHON, "-m", "gunicorn", f"{SITE}:app", "--no-control-socket", "-c", "{hooks}"]
GUNICORN += ["--bind", "127.0.0.1:{port}"]
UWSGI_OPTIONS = ["--master", "--processes", "2", "--enable-threads", "--die-on-term"]
UWSGI_OPTIONS += ["--http-socket", "127.0.0.1:{port}", "--module", f"{SITE}:app"]
UWSGI_OPTIONS += ["--need-app", "--venv", sys.prefix]

needs_uwsgi = pytest.mark.skipif(UWSGI is None, reason="uWSGI is an optional group: uwsgi")

# A worker that gets SIGTERM before this point takes it for its parent's, and lives on.
HOOKS = """
def post_worker_init(worker):
    with open({ready!r}, "a") as file:
        print(worker.pid, file=file)
"""


@pytest.fixture
def server() -> Iterator[MonitoredServer]:
    with MonitoredServer() as started:
        yield started


@pytest.fixture
def shop(make_pubsub: MakePubsub, server: MonitoredServer) -> NatsPubsub:
    return make_pubsub(urls=server.url, app_name="shop")


class Site:
    """The site under a web server that runs."""

    def __init__(self, process: Child, port: int) -> None:
        self.process = process
        self.port = port
        #: The exit code, once stopped.
        self.code: int | None = None

    @property
    def log(self) -> str:
        return self.process.log

    def ask(self, path: str, method: str = "POST") -> str:
        url = f"http://127.0.0.1:{self.port}/{path}"
        request = urllib.request.Request(url, method=method, headers={"Connection": "close"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text: str = answer.read().decode()
            return text

    def answers(self) -> bool:
        assert not self.process.has_ended, self.log
        with contextlib.suppress(OSError):
            return bool(self.ask("", "GET"))
        return False

    def publish(self, times: int, at_once: int = 8, path: str = "e") -> list[str]:
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(self.ask, (f"{path}{n}" for n in range(times))))

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.process.signal(how)
        self.code = self.process.wait(60)


@contextmanager
def running(
    command: list[str],
    server: MonitoredServer,
    env: str,
    folder: Path,
    workers: int = 0,
    **more: str,
) -> Iterator[Site]:
    """Run a web server; whatever happens, nothing of its process group is left."""
    port, ready, hooks = free_port(), folder / "ready", folder / "hooks.py"
    hooks.write_text(HOOKS.format(ready=str(ready)))
    words = [word.replace("{port}", str(port)).replace("{hooks}", str(hooks)) for word in command]
    variables = {"FLASK_NATSPUBSUB_URLS": server.url, "FLASK_NATSPUBSUB_ENV": env, **more}
    variables |= {"FLASK_NATSPUBSUB_APP_NAME": "shop"}
    process = Child(words, folder / "log", environment=variables)
    site = Site(process, port)
    try:
        eventually(site.answers, 60, "the server does not answer")
        if workers:
            eventually(lambda: len(ready.read_text().splitlines()) == workers, 60)
        yield site
    finally:
        process.kill()


def check_clean_stop(site: Site, server: MonitoredServer, how: signal.Signals) -> None:
    site.stop(how)
    assert site.code == 0, site.log
    assert "Traceback" not in site.log
    assert "Exception ignored" not in site.log
    eventually(lambda: not server.connections(), 30, "a connection is left")
    with pytest.raises(ProcessLookupError):
        os.killpg(site.process.pid, 0)


def threads_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


MATRIX = {
    "gunicorn-sync": [*GUNICORN, "--workers", "2"],
    "gunicorn-gthread": [*GUNICORN, "--workers", "2", "-k", "gthread", "--threads", "4"],
    "gunicorn-gevent": [*GUNICORN, "--workers", "2", "-k", "gevent"],
    "uwsgi": [str(UWSGI), *UWSGI_OPTIONS, "--lazy-apps"],
    "waitress": [*PYTHON, "-m", "waitress", "--listen", "127.0.0.1:{port}", f"{SITE}:app"],
}
SERVERS = [pytest.param(name, marks=[needs_uwsgi] if name == "uwsgi" else []) for name in MATRIX]
PRELOADING = {
    "sync": [*MATRIX["gunicorn-sync"], "--preload"],
    "gevent": [*MATRIX["gunicorn-gevent"], "--preload"],
    "uwsgi": [str(UWSGI), *UWSGI_OPTIONS],
}
PRELOADERS = [
    pytest.param(name, marks=[needs_uwsgi] if name == "uwsgi" else []) for name in PRELOADING
]


@pytest.mark.parametrize("name", SERVERS)
def test_every_publish_arrives_over_one_connection_a_process(
    shop: NatsPubsub, server: MonitoredServer, env: str, tmp_path: Path, name: str
) -> None:
    workers = 2 if name.startswith("gunicorn") else 0
    with running(MATRIX[name], server, env, tmp_path, workers) as site:
        pids = {int(pid) for pid in site.publish(200)}

        assert server.connections() == {f"shop-{pid}": 1 for pid in pids}
        if name != "waitress":
            assert site.process.pid not in pids
            if Path("/proc/self/task").exists():
                assert threads_of(site.process.pid) == 1
        # waitress ends by SIGINT only; SIGTERM is the system's own end of it
        check_clean_stop(site, server, signal.SIGINT if name == "waitress" else signal.SIGTERM)

    assert Counter(event_ids(stored(shop))) == Counter(f"e{n}" for n in range(200))


@pytest.mark.parametrize("name", PRELOADERS)
def test_a_connection_made_before_the_fork_stays_the_masters(
    shop: NatsPubsub, server: MonitoredServer, env: str, tmp_path: Path, name: str
) -> None:
    workers = 0 if name == "uwsgi" else 2
    command, more = PRELOADING[name], {"PUBLISH_AT_IMPORT": "1"}
    with running(command, server, env, tmp_path, workers, **more) as site:
        pids = {int(pid) for pid in site.publish(200)} | {site.process.pid}

        assert server.connections() == {f"shop-{pid}": 1 for pid in pids}
        assert set(server.connections("any").values()) == {1}
        check_clean_stop(site, server, signal.SIGTERM)

    assert Counter(event_ids(stored(shop))) == Counter(["master", *(f"e{n}" for n in range(200))])


@pytest.mark.parametrize("preload", [False, True])
def test_gevent_answers_200_requests_that_publish_at_once(
    shop: NatsPubsub, server: MonitoredServer, env: str, tmp_path: Path, preload: bool
) -> None:
    command = [*GUNICORN, "--workers", "1", "-k", "gevent", *(["--preload"] if preload else [])]
    with running(command, server, env, tmp_path, 1) as site:
        pids = set(site.publish(200, at_once=200))

        assert server.connections() == {f"shop-{pid}": 1 for pid in pids}
        assert len(pids) == 1
        check_clean_stop(site, server, signal.SIGTERM)

    assert Counter(event_ids(stored(shop))) == Counter(f"e{n}" for n in range(200))


@pytest.mark.parametrize("worker", ["sync", "gthread", "gevent"])
def test_async_views_publish(
    shop: NatsPubsub, server: MonitoredServer, env: str, tmp_path: Path, worker: str
) -> None:
    with running([*GUNICORN, "-k", worker], server, env, tmp_path, 1) as site:
        # Under gevent two async views cannot run at once, whatever they do: see the docs.
        site.publish(20, at_once=1 if worker == "gevent" else 8, path="async/e")
        check_clean_stop(site, server, signal.SIGTERM)

    assert Counter(event_ids(stored(shop))) == Counter(f"e{n}" for n in range(20))


def test_the_reloader_has_one_connection(
    shop: NatsPubsub, server: MonitoredServer, env: str, tmp_path: Path
) -> None:
    command = [*PYTHON, "-m", "flask", "--app", SITE, "run", "--debug", "--port", "{port}"]
    with running(command, server, env, tmp_path) as site:
        (pid,) = set(site.publish(100))

        assert int(pid) != site.process.pid
        assert server.connections() == {f"shop-{pid}": 1}
        assert "Traceback" not in site.log

    assert Counter(event_ids(stored(shop))) == Counter(f"e{n}" for n in range(100))
