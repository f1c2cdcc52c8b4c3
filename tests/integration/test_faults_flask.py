"""Faults of the table in docs/reliability.md that concern the process that publishes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.support.servers import NatsServer, free_port

pytestmark = pytest.mark.real_server

#: Ends with messages that nobody waits for. It says when it is connected, and when it ends.
SCRIPT = """
import sys
from flask import Flask
from flask_natspubsub import NatsPubsub
url, env, state = sys.argv[1:]
app = Flask("shop")
app.config.update(NATSPUBSUB_URLS=url, NATSPUBSUB_ENV=env)
pubsub = NatsPubsub(app)
if state != "never there":
    pubsub.publish("a", {})
    print("connected", flush=True)
    sys.stdin.readline()
for _ in range(500):
    pubsub.publish_nowait("a", {"text": "x" * 1000}, timeout=60)
print("ends", flush=True)
"""

#: What closing may take at the end of the interpreter, and what a busy machine may add; seconds.
BOUND, MARGIN = 2.0, 8.0


@pytest.mark.parametrize("state", ["never there", "gone", "silent"])
def test_a_process_that_ends_while_the_server_is_away_does_not_hang(env: str, state: str) -> None:
    with NatsServer() as server:
        seconds = _end_of_a_process(server, env, state)
    assert seconds < BOUND + MARGIN


def _end_of_a_process(server: NatsServer, env: str, state: str) -> float:
    """Return how long a process takes to end, after the last line of its script."""
    url = f"nats://127.0.0.1:{free_port()}" if state == "never there" else server.url
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT, url, env, state],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        if state != "never there":
            assert process.stdout.readline() == "connected\n"
            (server.pause if state == "silent" else server.kill)()
            print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "ends\n"
        began = time.monotonic()
        out, err = process.communicate(timeout=60)
        seconds = time.monotonic() - began
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err
    assert "closed with 500 messages not acknowledged" in err
    return seconds
