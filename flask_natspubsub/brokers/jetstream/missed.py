"""Catches up on what a consumer passed over while somebody had taken subjects away from it.

The server does not come back to a message that a consumer's filters left out at that moment. So a
second consumer delivers what came meanwhile, to the same handler, and is deleted once that has
been worked off. If the process ends before, the next one goes on with that consumer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ...errors import NatsPubsubError
from ...text import get_logger
from ..agreement import UNTIL
from ..base import ConsumerConfig, Delivery
from .api import Json
from .consumer_api import ConsumerApi, Floor, needs_of

if TYPE_CHECKING:
    from .pull import Pull

_log = get_logger("flask_natspubsub.broker")

#: The number of messages in hand beside those of the other pull.
AT_ONCE = 10
#: Seconds between two looks whether all has been worked off.
LOOK_EVERY = 2.0
#: Makes a pull that hands over what it gets.
MakePull = Callable[[ConsumerConfig, Callable[[Delivery], None]], "Pull"]


def name_of(config: ConsumerConfig) -> str:
    """Return the name of the consumer that catches up for another one."""
    return f"{config.durable}-missed"


async def catch_up(
    api: ConsumerApi,
    pull: Pull,
    filters: tuple[str, ...],
    after: int,
    make: MakePull,
) -> None:
    """Deliver what came for ``filters`` behind the message ``after``, until now."""
    with contextlib.suppress(NatsPubsubError):  # it says so itself, and the next start goes on
        stream = await api.stream(pull.config.stream)
        until = ((stream or {}).get("state") or {}).get("last_seq", 0)
        if stream is None or until <= after:
            return
        _log.warning(
            "%s: what came for %s from message %d to %d of %r may have been passed over: it is "
            "gone through again",
            pull.config.durable, ", ".join(filters), after + 1, until, pull.config.stream,
        )  # fmt: skip
        config = _config(pull.config, filters, until)
        start = Floor(str(stream.get("created", "")), after)
        await _work_off(api, pull, config, start, make)


async def go_on(api: ConsumerApi, pull: Pull, make: MakePull) -> None:
    """Go on with what another process had begun to catch up on."""
    with contextlib.suppress(NatsPubsubError):
        report = await api.consumer(pull.config.stream, name_of(pull.config))
        until = _until(report)
        if report is not None and until:
            config = _config(pull.config, needs_of(report["config"]).filter_subjects, until)
            await _work_off(api, pull, config, Floor(), make)


def _until(report: Json | None) -> int:
    return int(((report or {}).get("config", {}).get("metadata") or {}).get(UNTIL, 0))


def _config(config: ConsumerConfig, filters: tuple[str, ...], until: int) -> ConsumerConfig:
    return msgspec.structs.replace(
        config,
        durable=name_of(config),
        filter_subjects=filters,
        deliver_policy="all",
        elsewhere="",
        max_ack_pending=min(AT_ONCE, config.max_ack_pending),
        metadata={UNTIL: str(until)},
    )


async def _work_off(
    api: ConsumerApi,
    pull: Pull,
    config: ConsumerConfig,
    after: Floor,
    make: MakePull,
) -> None:
    until = int(config.metadata[UNTIL])

    def take(delivery: Delivery) -> None:
        if delivery.sequence <= until:
            pull.deliver(delivery)
        else:
            delivery.ack()  # of this consumer: the other one has it too
        extra.request(1)

    pull.companion = extra = make(config, take)
    try:
        await extra.open(after)
        extra.request(AT_ONCE)
        while not pull.is_closed:
            await asyncio.sleep(LOOK_EVERY)
            report = await api.consumer(config.stream, config.durable)
            if report is None or _is_done(report, until):
                await extra.close()
                await api.delete_consumer(config.stream, config.durable)
                return
    finally:
        await extra.close()


def _is_done(report: Json, until: int) -> bool:
    delivered = (report.get("delivered") or {}).get("stream_seq", 0)
    return not report.get("num_ack_pending") and (
        delivered >= until or not report.get("num_pending")
    )
