"""The nearest outbox: faststream-outbox, relaying from PostgreSQL to a JetStream."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from faststream.nats import NatsBroker
from faststream_outbox import OutboxBroker, make_outbox_table
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import create_async_engine

QUEUE = "orders"
WORKERS = 10
FETCHED = 100


def faststream_outbox(database: str, url: str, subject: str, stream: str, count: int) -> float:
    """Write ``count`` rows, and let it relay them; returns rows a second."""
    return asyncio.run(_relay(database, url, subject, stream, count))


async def _relay(database: str, url: str, subject: str, stream: str, count: int) -> float:
    quiet = logging.getLogger("faststream.quiet")
    engine = create_async_engine(database.replace("+psycopg", "+asyncpg"), pool_size=WORKERS + 2)
    metadata = MetaData()
    outbox = OutboxBroker(
        engine,
        outbox_table=make_outbox_table(metadata, table_name="peer_outbox"),
        logger=quiet,
        log_level=logging.DEBUG,
    )
    nats = NatsBroker(url, logger=quiet, log_level=logging.DEBUG)
    done, times = asyncio.Event(), list[float]()

    @outbox.subscriber(QUEUE, max_workers=WORKERS, fetch_batch_size=FETCHED)
    async def relay(message: dict[str, Any]) -> None:
        await nats.publish(message, subject, stream=stream)
        times.append(time.perf_counter())
        if len(times) == count:
            done.set()

    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        rows = [{"n": n} for n in range(count)]
        await outbox.publish_batch(*rows, queue=QUEUE, session=connection)
    await nats.start()
    await outbox.start()
    try:
        await asyncio.wait_for(done.wait(), 60)
    finally:
        await outbox.stop()
        await nats.stop()
        await engine.dispose()
    return (count - FETCHED) / (times[count - 1] - times[FETCHED - 1])
