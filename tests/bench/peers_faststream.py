"""The nearest framework: FastStream, with a synchronous handler."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from faststream.nats import JStream, NatsBroker, PullSub


def faststream_pull(url: str, subject: str, stream: str, durable: str, count: int) -> float:
    """Let FastStream pull by hundreds; returns messages a second."""
    return asyncio.run(_pull(url, subject, stream, durable, count))


async def _pull(url: str, subject: str, stream: str, durable: str, count: int) -> float:
    broker = NatsBroker(url, logger=logging.getLogger("faststream.quiet"), log_level=logging.DEBUG)
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
