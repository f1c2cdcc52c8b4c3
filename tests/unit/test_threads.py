"""The thread of a broker where Python's threads have been replaced."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flask_natspubsub.brokers.loop import BackgroundLoop
from flask_natspubsub.brokers.threads import is_patched_by_gevent

EVENTLET = """
import warnings
warnings.simplefilter("ignore")
import eventlet
eventlet.monkey_patch()
from flask import Flask
from flask_natspubsub import ConfigurationError, NatsPubsub
app = Flask("shop")
app.config["NATSPUBSUB_ENV"] = "test"
pubsub = NatsPubsub(app)
try:
    pubsub.publish("a", {})
except ConfigurationError as error:
    print(error)
"""

GEVENT = """
from gevent import monkey
monkey.patch_all()
import sys
{hide}
import asyncio, gevent
from flask_natspubsub.brokers.loop import BackgroundLoop

loop = BackgroundLoop("test")
assert not loop.is_current

async def nap():
    await asyncio.sleep(0.3)
    return loop.is_current

napping = [gevent.spawn(loop.call, nap(), 30) for _ in range(50)]
turns = 0
while not all(one.ready() for one in napping):
    gevent.sleep(0.01)
    turns += 1
assert [one.get() for one in napping] == [True] * 50
assert turns > 3, turns
loop.stop(30)
assert not loop.is_alive
print("ok")
"""


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_eventlet_is_refused_with_advice() -> None:
    text = run(EVENTLET)
    assert "eventlet has replaced Python's threads" in text
    assert "gthread or gevent" in text


@pytest.mark.parametrize("hide", ["", 'sys.modules["uvloop"] = None'])
def test_under_gevent_the_loop_is_in_a_real_thread_and_waiting_lets_others_run(hide: str) -> None:
    assert run(GEVENT.format(hide=hide)) == "ok\n"


def test_without_patches_a_plain_thread() -> None:
    assert not is_patched_by_gevent()
    loop = BackgroundLoop("test")
    try:
        assert not loop.is_current
    finally:
        loop.stop()
    assert not loop.is_alive
