"""The nearest framework: FastStream, with a synchronous handler; its log goes into a file."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from faststream.nats import JStream, NatsBroker, PullSub


def faststream_pull(
    url: str, subject: str, stream: str, durable: str, count: int, folder: Path
) -> float:
    """Let FastStream pull by hundreds, in a process of its own; returns messages a second."""
    arguments = [url, subject, stream, durable, str(count)]
    path = folder / f"{durable}.log"
    with path.open("wb") as log:  # it logs to stdout
        command = [sys.executable, "-m", __name__, *arguments]
        subprocess.run(command, stdout=log, stderr=log, check=True)
    return float(path.read_text().splitlines()[-1])


async def _pull(url: str, subject: str, stream: str, durable: str, count: int) -> float:
    broker = NatsBroker(url)
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    times: list[float] = []

    @broker.subscriber(
        subject,
        stream=JStream(name=stream, declare=False),
        durable=durable,
        pull_sub=PullSub(batch_size=100),
    )
    def handle(message: dict[str, Any]) -> None:
        times.append(time.perf_counter())
        if len(times) == count:
            loop.call_soon_threadsafe(done.set)

    await broker.start()
    try:
        await asyncio.wait_for(done.wait(), 60)
    finally:
        await broker.stop()
    return (count - 100) / (times[count - 1] - times[99])


if __name__ == "__main__":
    print(asyncio.run(_pull(*sys.argv[1:5], int(sys.argv[5]))))
