"""A pull on a durable consumer, against a link that only writes down what it is asked."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from flask_natspubsub.brokers.base import ConsumerConfig
from flask_natspubsub.brokers.jetstream.pull import TIMING, Pull
from flask_natspubsub.brokers.jetstream.settling import ReplyWriter

CONFIG = ConsumerConfig(stream="events", durable="mailer", filter_subjects=("shop.>",))
#: A pull that the server has ended is opened anew at once.
AT_ONCE = TIMING._replace(retry=0.0)
SECOND = ("pull", "_INBOX.2")
#: A pull falls silent soon, and its consumer is looked at often.
SOON = AT_ONCE._replace(heartbeat=0.04, grace=0.0, quiet=0.02, look=0.04, first_look=0.02)


class FakeLink:
    """A connection to a server that is the test."""

    def __init__(self):
        self.is_up = True
        self.max_payload = 1024 * 1024
        self.log = []
        self.bodies = []
        self.routes = {}
        #: How many messages the server may still send, by reply subject.
        self.open = Counter()
        self.while_unrouting = lambda: None
        self.tasks = []
        self._number = 0

    def send(self, frames):
        for frame in frames:
            line, payload, _ = frame.split(b"\r\n")
            _, subject, *reply, _ = line.decode().split()
            if subject.startswith("$JS.API"):
                self.log.append(("pull", *reply))
                self.bodies.append(json.loads(payload))
                self.asked = getattr(self, "asked", 0) + self.bodies[-1]["batch"]
                self.open[reply[0]] += self.bodies[-1]["batch"]
            else:
                self.log.append(("reply", payload.split()[0]))

    def wake(self, callback):
        callback()

    def later(self, seconds, callback):
        callback()

    def new_reply_subject(self):
        self._number += 1
        return f"_INBOX.{self._number}"

    async def route(self, subject, handler):
        self.routes[self._number] = handler
        self.log.append(("route", subject))
        return self._number

    async def unroute(self, key, *, flush=False):
        await asyncio.sleep(0)
        self.while_unrouting()
        self.log.append(("unroute", f"_INBOX.{key}", flush))
        self.routes.pop(key, None)
        self.open.pop(f"_INBOX.{key}", None)

    def spawn(self, coroutine):
        self.tasks.append(asyncio.create_task(coroutine))
        return self.tasks[-1]

    def run(self, coroutine, timeout):
        raise AssertionError("not used here")

    async def reset(self, why):
        self.log.append(("reset", why))


class FakeApi:
    prefix = "$JS.API"

    def __init__(self):
        self.errors = []
        self.asked_after = []
        self.floor = 0
        self.report = {}
        self.looked = []

    async def place(self, config):
        return config

    async def ensure_consumer(self, config, standing):
        await asyncio.sleep(0)
        self.asked_after.append(standing.after.sequence)
        if self.errors:
            raise self.errors.pop(0)
        return {"ack_floor": {"stream_seq": self.floor}, "stream_created": "then"}

    async def consumer(self, stream, durable):
        self.looked.append(durable)
        return {"ack_floor": {"stream_seq": self.floor}, **self.report}


class FakeSession:
    """A process without other pulls."""

    def __init__(self, link, api):
        self.link, self.api, self.writer = link, api, ReplyWriter(link)
        self.loop = SimpleNamespace(is_alive=True)
        self.presence = None
        self.pulls = set()
        self.caught_up = []

    def catch_up(self, pull, filters, after):
        self.caught_up.append((filters, after))


class Bench:
    def __init__(self, timing):
        self.link, self.api = FakeLink(), FakeApi()
        self.received = []
        self.session = FakeSession(self.link, self.api)
        self.pull = Pull(self.session, CONFIG, self.received.append, timing=timing)
        self._sequence = 0

    @property
    def outstanding(self):
        """How many messages the server may still send."""
        return self.link.open.total()

    def arrive(self, key=None):
        """A message arrives on a reply subject; the newest if none is named."""
        self._sequence += 1
        self.link.open[f"_INBOX.{key or max(self.link.routes)}"] -= 1
        reply = f"$JS.ACK.events.mailer.1.{self._sequence}.1.1700000000000000000.0"
        self.link.routes[key or max(self.link.routes)]("shop.a", reply, {}, b"{}")

    def status(self, code, description="", pending=0, left=None):
        headers = {"Status": code, "Description": description}
        if pending or left is not None:
            headers["Nats-Pending-Messages"] = str(pending)
        if left is not None:
            headers["Nats-Pending-Bytes"] = str(left)
        newest = max(self.link.routes)
        if code == "408":
            self.link.open[f"_INBOX.{newest}"] -= pending
        self.link.routes[newest]("_INBOX", "", headers, b"")

    @property
    def pulls(self):
        return [entry[1] for entry in self.link.log if entry[0] == "pull"]

    def heartbeat(self):
        """The server has nothing to send, and lives."""
        self.status("100", "Idle Heartbeat")

    async def run_tasks(self):
        """Let the tasks of the pull run until they wait for time to pass."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def until(self, condition):
        """Wait until ``condition()`` holds."""
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - of what there is no event
                await asyncio.sleep(0.005)

    async def close(self):
        for task in self.link.tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def with_bench(test=None, *, timing=AT_ONCE):
    """Run an async test with a bench, on a loop of its own."""
    if test is None:
        return functools.partial(with_bench, timing=timing)

    def run():
        async def main():
            bench = Bench(timing)
            try:
                await test(bench)
            finally:
                await bench.close()

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@with_bench
async def test_what_is_requested_before_it_is_open_is_asked_for_then(bench):
    bench.pull.request(3)
    assert bench.pulls == []
    await bench.pull.open()
    assert bench.pulls == ["_INBOX.1"]
    assert bench.link.asked == 3


@with_bench
async def test_messages_use_up_what_was_requested(bench):
    await bench.pull.open()
    bench.pull.request(2)
    bench.arrive()
    bench.arrive()
    assert len(bench.received) == 2
    assert bench.link.asked == 2
    assert bench.pull.is_healthy


@with_bench
async def test_an_expired_pull_is_asked_again_for_the_rest(bench):
    await bench.pull.open()
    bench.pull.request(5)
    bench.arrive()
    bench.status("408", "Request Timeout", pending=4)
    assert bench.link.asked == 5 + 4
    assert bench.pulls == ["_INBOX.1"] * 2


@with_bench
async def test_a_heartbeat_changes_nothing(bench):
    await bench.pull.open()
    bench.pull.request(5)
    bench.status("100", "Idle Heartbeat")
    assert bench.link.asked == 5


@pytest.mark.parametrize("why", ["Consumer Deleted", "Leadership Change", ""])
def test_a_pull_that_the_server_ended_is_asked_again_on_a_fresh_reply_subject(why):
    @with_bench
    async def test(bench):
        await bench.pull.open()
        bench.pull.request(5)
        bench.arrive()
        bench.status("409", why)
        await bench.run_tasks()
        assert bench.pulls == ["_INBOX.1", "_INBOX.2"]
        assert bench.link.asked == 5 + 4
        assert list(bench.link.routes) == [2]

    test()


@with_bench
async def test_nothing_is_asked_on_a_reply_subject_that_is_about_to_be_given_up(bench):
    await bench.pull.open()
    bench.status("409", "Leadership Change")
    bench.pull.request(1)
    assert bench.pulls == []
    await bench.run_tasks()
    assert bench.pulls == ["_INBOX.2"]


@with_bench
async def test_what_is_on_its_way_to_the_old_reply_subject_still_arrives_and_counts(bench):
    await bench.pull.open()
    bench.pull.request(5)
    bench.link.while_unrouting = lambda: bench.arrive(1)
    bench.pull.on_up()
    await bench.run_tasks()

    assert len(bench.received) == 1
    assert ("unroute", "_INBOX.1", True) in bench.link.log
    assert bench.link.asked == 5 + 4


@with_bench
async def test_opening_is_tried_again_whatever_goes_wrong(bench):
    await bench.pull.open()
    bench.pull.request(1)
    bench.api.errors = [OSError("gone"), RuntimeError("unforeseen"), TimeoutError()]
    bench.pull.on_up()
    await bench.run_tasks()
    assert bench.api.errors == []
    assert bench.pulls == ["_INBOX.1", "_INBOX.2"]


@with_bench
async def test_nothing_is_tried_without_a_connection(bench):
    await bench.pull.open()
    bench.link.is_up = False
    bench.pull.request(1)
    bench.status("409", "Server Shutdown")
    await bench.run_tasks()
    assert bench.pulls == []
    assert len(bench.api.asked_after) == 1

    bench.link.is_up = True
    bench.pull.on_up()
    await bench.run_tasks()
    assert bench.pulls == ["_INBOX.2"]


@with_bench
async def test_a_consumer_made_anew_begins_where_the_old_one_had_got_to(bench):
    bench.api.floor = 41
    await bench.pull.open()
    bench.status("409", "Consumer Deleted")
    await bench.run_tasks()
    assert bench.api.asked_after == [0, 41]


@with_bench(timing=SOON)
async def test_a_silent_pull_is_made_anew_and_then_the_connection(bench):
    await bench.pull.open()
    bench.pull.request(1)
    assert bench.pull.is_healthy
    await bench.until(lambda: not bench.pull.is_healthy)
    await bench.until(lambda: bench.pulls[:2] == ["_INBOX.1", "_INBOX.2"])
    assert "reset" not in [entry[0] for entry in bench.link.log[: bench.link.log.index(SECOND)]]

    await bench.until(lambda: ("reset", "pulls are silent") in bench.link.log)


@with_bench(timing=SOON)
async def test_a_pull_that_waits_for_nothing_may_be_silent(bench):
    await bench.pull.open()
    began = len(bench.api.looked)
    await bench.until(lambda: len(bench.api.looked) > began + 5)
    assert bench.pull.is_healthy
    assert bench.link.log == [("route", "_INBOX.1")]


@with_bench
async def test_what_arrives_while_closing_is_handed_back_after_interest_is_gone(bench):
    """Before, the server would give it to this very pull again, and count each time."""
    await bench.pull.open()
    bench.pull.request(2)
    bench.link.while_unrouting = lambda: (bench.arrive(1), bench.arrive(1))
    await bench.pull.close()

    assert bench.received == []
    assert bench.link.log[-3:] == [
        ("unroute", "_INBOX.1", True),
        ("reply", b"-NAK"),
        ("reply", b"-NAK"),
    ]


@with_bench
async def test_a_closed_pull_asks_for_nothing(bench):
    await bench.pull.open()
    await bench.pull.close()
    bench.pull.request(3)
    bench.pull.on_up()
    await bench.run_tasks()
    assert bench.pulls == []


@with_bench
async def test_requests_are_neither_forgotten_nor_repeated(bench):
    """Whatever happens, what the server may still send is what was requested and not given."""
    source = random.Random(3)
    await bench.pull.open()
    requested = 0
    for _ in range(500):
        event = source.randrange(5)
        if event == 0:
            count = source.randrange(1, 5)
            requested += count
            bench.pull.request(count)
        elif event == 1 and bench.outstanding:
            bench.arrive()
        elif event == 2 and bench.outstanding:
            bench.status("408", pending=source.randrange(1, bench.outstanding + 1))
        elif event == 3:
            bench.status("409", "Leadership Change")
        elif event == 4:
            await bench.run_tasks()
    await bench.run_tasks()
    assert bench.outstanding == requested - len(bench.received)


# --- bounded in bytes


@with_bench
async def test_a_request_is_bounded_in_bytes_and_so_are_all_of_them(bench):
    bench.pull.bound(64 * 1024 * 1024, lambda count: None)
    await bench.pull.open()
    for _ in range(20):
        bench.pull.request(2)
    assert [pull["max_bytes"] for pull in bench.link.bodies] == [4 * 1024 * 1024] * 16
    for _ in range(32):
        bench.arrive()
    assert [pull["batch"] for pull in bench.link.bodies] == [2] * 16 + [8]


@with_bench
async def test_a_request_that_has_brought_all_makes_room_for_another(bench):
    """Newer servers say so; with others it is known once all that was asked for has come."""
    bench.pull.bound(64 * 1024 * 1024, lambda count: None)
    await bench.pull.open()
    for _ in range(17):
        bench.pull.request(2)
    assert len(bench.link.bodies) == 16
    bench.arrive()
    bench.arrive()
    bench.status("409", "Batch Completed", left=0)
    assert [pull["batch"] for pull in bench.link.bodies] == [2] * 17


@with_bench
async def test_any_message_that_the_server_takes_fits_in_a_request(bench):
    bench.pull.bound(1024, lambda count: None)
    await bench.pull.open()
    bench.pull.request(5)
    bench.pull.request(5)
    (pull,) = bench.link.bodies
    assert pull["max_bytes"] > bench.link.max_payload


@with_bench
async def test_what_a_request_does_not_bring_is_given_back(bench):
    spared = []
    bench.pull.bound(16 * 1024 * 1024, spared.append)
    await bench.pull.open()
    bench.pull.request(10)
    for _ in range(4):
        bench.arrive()
    bench.status("409", "Message Size Exceeds MaxBytes", pending=6, left=100)
    assert spared == [6]
    assert len(bench.link.bodies) == 1
    bench.pull.request(3)
    assert [pull["batch"] for pull in bench.link.bodies] == [10, 3]


@with_bench
async def test_one_larger_than_a_request_may_be_comes_by_itself(bench):
    spared = []
    bench.pull.bound(16 * 1024 * 1024, spared.append)
    await bench.pull.open()
    bench.pull.request(10)
    bench.status("409", "Message Size Exceeds MaxBytes", pending=10, left=4 * 1024 * 1024)
    assert spared == [9]
    assert bench.link.bodies[1]["batch"] == 1
    assert "max_bytes" not in bench.link.bodies[1]


@with_bench
async def test_a_request_that_is_complete_is_no_error(bench):
    bench.pull.bound(16 * 1024 * 1024, lambda count: None)
    await bench.pull.open()
    bench.pull.request(1)
    bench.arrive()
    bench.status("409", "Batch Completed", left=100)
    bench.pull.request(2)
    await bench.run_tasks()
    assert [pull["batch"] for pull in bench.link.bodies] == [1, 2]
    assert len(bench.link.routes) == 1


# --- held back


@with_bench(timing=SOON._replace(heartbeat=0.5))
async def test_new_messages_that_the_server_holds_back_are_reported(bench):
    await bench.pull.open()
    bench.pull.request(5)
    report = {"num_ack_pending": 100, "num_pending": 7, "config": {"max_ack_pending": 100}}
    bench.api.report = report
    await bench.until(lambda: bench.heartbeat() or not bench.pull.is_healthy)
    bench.api.report = report | {"num_ack_pending": 99}
    await bench.until(lambda: bench.heartbeat() or bench.pull.is_healthy)
    assert len(bench.link.routes) == len(bench.pulls) == 1
