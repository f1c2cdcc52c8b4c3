"""A nats-py that has moved a private name: the public way does the same, or the error is clear."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.aio.transport import TcpTransport

from flask_natspubsub import ConfigurationError
from flask_natspubsub.brokers.jetstream import nats_py
from flask_natspubsub.brokers.jetstream.client import NatsBroker
from flask_natspubsub.config.settings import Settings
from tests.support.proxy import Proxy
from tests.support.servers import NatsServer

pytestmark = pytest.mark.real_server

#: Publishes, gets, loses the connection, does so again, and stops in order. Says how far it is.
PROGRAM = """
import sys, threading, time
import nats
from nats.aio.client import Client
from nats.aio.transport import TcpTransport
from flask_natspubsub import ConfigurationError
from flask_natspubsub.brokers.base import ConsumerConfig, StreamConfig
from flask_natspubsub.brokers.jetstream.client import NatsBroker
from flask_natspubsub.messages.message import Message
from flask_natspubsub.config.settings import Settings

url, folder, name = sys.argv[1:]
assert nats.__file__.startswith(folder), nats.__file__
assert not hasattr(Client(), name) and not hasattr(TcpTransport(), name)
try:
    broker = NatsBroker(Settings(urls=(url,), env="t", app_name="shop"))
except ConfigurationError as error:
    print(error)
    sys.exit()
broker.want([StreamConfig(name="moved", subjects=("moved.>",))])
broker.connect(10)
got, heard, came = [], [], threading.Event()

def take(delivery):
    delivery.ack()
    got.append(bytes(delivery.data))
    came.set()

def listen(message):
    heard.append(message.data)
    came.set()

def wait_for(count, things):
    deadline = time.monotonic() + 20
    while len(things) < count:
        assert came.wait(deadline - time.monotonic()), (count, things)
        came.clear()

pull = broker.consume(
    ConsumerConfig(stream="moved", durable="mailer", filter_subjects=("moved.>",)), take
)
listening = broker.listen("beside", listen)
pull.request(100)

def round(number):
    messages = [
        Message("moved.a", b"%d" % n, {"Nats-Msg-Id": f"{number}-{n}"}) for n in range(50)
    ]
    ticket = broker.submit(messages, 20)
    wait_for(50 * number, got)
    broker.send("beside", b"heard")
    wait_for(number, heard)

round(1)
print("ready", flush=True)
sys.stdin.readline()
round(2)
pull.stop()
listening.stop()
assert broker.get_message("moved", 100).data == b"49"
broker.close()
print(len(set(got)), len(got), "in order")
"""


def moved(folder: Path, name: str) -> None:
    """Copy nats-py to ``folder``, where a private name is another."""
    package = Path(nats.__file__).parent
    for path in package.rglob("*.py"):
        copied = folder / "nats" / path.relative_to(package)
        copied.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text("utf-8")
        copied.write_text(re.sub(rf"\b{name}\b", f"_moved{name}", text), "utf-8")


def start(folder: Path, name: str, url: str) -> subprocess.Popen[str]:
    moved(folder, name)
    # The folder of the program comes first on the path, before what is installed.
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(program), url, str(folder), name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", nats_py.HELPFUL)
def test_without_a_name_that_helps_the_public_way_does_the_same(name: str, tmp_path: Path) -> None:
    with NatsServer() as server, Proxy(server.port) as proxy:
        process = start(tmp_path, name, proxy.url)
        assert process.stdout is not None
        ready = process.stdout.readline()
        proxy.cut()
        said, errors = process.communicate("go on\n", 60)

        assert (ready, said) == ("ready\n", "50 100 in order\n"), errors
        assert "Traceback" not in errors
        assert proxy.accepted == 2


@pytest.mark.parametrize("name", nats_py.NEEDED)
def test_without_a_name_that_nothing_replaces_the_error_is_clear(name: str, tmp_path: Path) -> None:
    with start(tmp_path, name, "nats://127.0.0.1:1") as process:
        said, errors = process.communicate(timeout=60)

    assert f"nats-py {version('nats-py')} cannot be used: its client has no {name}" in said, errors
    assert f"known to work: pip install 'nats-py=={nats_py.KNOWN_TO_WORK}.*'" in said


def test_a_hook_that_nats_py_would_call_otherwise_is_no_hook(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Changed(nats_py.Client):
        async def _process_info(self, info: Any, *, first: bool) -> None:  # type: ignore[override]
            raise AssertionError("not called here")

    monkeypatch.setattr(nats_py, "Client", Changed)

    with pytest.raises(ConfigurationError, match=r"no _process_info\(info, initial_connection\)"):
        NatsBroker(Settings())


def test_the_installed_version_has_them_all() -> None:
    nats_py.check()
    client = nats_py.Client()
    transport = TcpTransport()
    subscription = nats_py.Subscription(client)
    for name in nats_py.HELPFUL:
        assert any(hasattr(one, name) for one in (client, transport, subscription)), name
