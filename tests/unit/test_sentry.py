"""What Sentry's logging integration sees of handlers that fail; in a process that it may patch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SITE = """
import json

import sentry_sdk
from flask import Flask

from flask_natspubsub import NatsPubsub, Retry
from flask_natspubsub.testing import TestBroker

seen = []


class Keep(sentry_sdk.transport.Transport):
    def capture_envelope(self, envelope):
        seen.append(envelope.get_event())


sentry_sdk.init("http://key@localhost/1", transport=Keep)
app = Flask("shop")
pubsub = NatsPubsub(app)


@pubsub.subscriber("order.created", max_deliver=3)
def ship(message):
    return message["address"]


@pubsub.subscriber("order.paid", max_deliver=2)
def wait(message):
    raise Retry(delay=1)


with TestBroker(app) as broker:
    broker.deliver("order.created", {"n": 1}, event_id="e1")
    events = [event for event in seen if event]
    broker.deliver("order.paid", {})
print(json.dumps([events, len(seen) - len(events)], default=str))
"""


def seen_by_sentry() -> tuple[list[dict[str, Any]], int]:
    done = subprocess.run(
        [sys.executable, "-c", SITE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    events, others = json.loads(done.stdout.splitlines()[-1])
    return events, others


def test_the_first_failure_and_the_last_are_events_with_the_handlers_frames() -> None:
    events, others = seen_by_sentry()

    assert [event["extra"]["result"] for event in events] == ["retried", "dead_lettered"]
    for event in events:
        assert event["level"] == "error"
        assert event["logger"] == "flask_natspubsub.worker"
        assert (event["extra"]["event_id"], event["extra"]["subscriber"]) == ("e1", "ship")
        (exception,) = event["exception"]["values"]
        assert exception["type"] == "KeyError"
        assert [frame["function"] for frame in exception["stacktrace"]["frames"]] == ["ship"]
    assert others == 1, "a message that was asked for again became a dead letter, and that only"
