"""The queue and the window of publishes, without a connection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flask_natspubsub.brokers.jetstream.publish_window import WRITE, PublishWindow
from flask_natspubsub.config.settings import Settings
from flask_natspubsub.messages.message import Message


class Loop:
    """What the window asks of its connection, kept until it is the turn of the loop."""

    is_up = True
    refused = ""
    max_payload = 1024
    unsent = 0
    cluster_size = 1

    def __init__(self) -> None:
        self.written: list[int] = []
        self._turns: list[Callable[[], None]] = []

    def send(self, frames: Sequence[bytes]) -> None:
        self.written.append(len(frames))

    def wake(self, callback: Callable[[], None]) -> None:
        self._turns.append(callback)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        if not seconds:
            self._turns.append(callback)

    def describe_down(self) -> str:
        return ""

    def mend_streams(self) -> None:
        pass

    def turn(self) -> bool:
        """Run what was asked for before this turn."""
        now, self._turns = self._turns, []
        for callback in now:
            callback()
        return bool(now)


def test_of_many_messages_the_first_are_written_before_the_last_are_encoded() -> None:
    """A loop may write at the end of its turns only; the server need not wait for all."""
    loop = Loop()
    window = PublishWindow(loop, "_INBOX.x", Settings())

    window.submit([Message("a.b.c", b"{}", {})] * (2 * WRITE + 10), 5.0)

    assert loop.turn()
    assert loop.written == [WRITE]
    while loop.turn():
        pass
    assert loop.written == [WRITE, WRITE, 10]


def test_headers_count_in_what_is_queued_and_all_is_given_back() -> None:
    """Their size is exact only once they are encoded; the limit has to hold before."""
    loop = Loop()
    loop.is_up = False
    window = PublishWindow(loop, "_INBOX.x", Settings(publish_queue_bytes=700))
    message = Message("a.b.c", b"{}", {"note": "x" * 600})

    window.submit([message], 5.0)
    assert 600 <= window.load()["publishes_queued_bytes"] < 700
    window.submit([message], 5.0)
    refused = window.submit([message], 0.0)

    assert "waiting to be sent already" in str(refused.results[0])
    loop.is_up = True
    while loop.turn():
        pass
    assert loop.written == [2]
    window.on_down()
    assert window.load()["publishes_queued_bytes"] > 1200
    window.on_up()
    for token in (3, 4):
        window.on_reply(f"_INBOX.x.{token}", "", {}, b'{"stream": "S", "seq": 1}')
    assert window.unsettled == 0
    assert window.load()["publishes_queued_bytes"] == 0
    assert window._bytes == 0
