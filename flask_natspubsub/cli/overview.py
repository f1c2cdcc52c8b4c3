"""``subscribers``, ``setup`` and ``config``: what the app has and what the server has."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from ..brokers.base import Broker, Change
from ..brokers.topology import refuse_volatile
from ..state import AppState
from ..subscribing.subscription import Subscription
from ..text import printable
from .group import natspubsub, onlooker
from .output import json_option, print_json, print_table

_COUNTS = ("pending", "ack_pending", "redelivered")
_SIGNS = {
    "create": ("+", "green"),
    "add_subjects": ("~", "green"),
    "differs": ("!", "yellow"),
    "ok": ("=", None),
}
_WORDS = {"create": "create with", "add_subjects": "add", "differs": "differs:", "ok": ""}


@natspubsub.command("subscribers", examples=["flask natspubsub subscribers"])
@click.option("--offline", is_flag=True, help="Do not ask the server for counts.")
@json_option
def subscribers_command(state: AppState, offline: bool, as_json: bool) -> None:
    """List the subscribers, and how much waits for each.

    PENDING is not delivered yet, UNACKED is delivered and not settled, and of that
    REDELIVERED more than once. "-": the server has no consumer yet; a worker makes it.
    """
    subscriptions = state.subscriptions()
    if offline:
        rows = [_describe(one, None, state.settings.stream) for one in subscriptions]
    else:
        with onlooker(state) as broker:
            rows = [_describe(one, broker, state.settings.stream) for one in subscriptions]
    if as_json:
        print_json(rows)
    elif not rows:
        click.echo("There are no subscribers; NATSPUBSUB_SUBSCRIBERS lists modules that have some.")
    else:
        _print_subscribers(rows)


def _describe(subscription: Subscription, broker: Broker | None, stream: str) -> dict[str, Any]:
    info = broker.consumer_info(stream, subscription.durable) if broker else None
    return {
        "name": subscription.name,
        "topics": list(subscription.topics),
        "filter_subjects": list(subscription.filter_subjects),
        "durable": subscription.durable,
        "concurrency": subscription.concurrency,
        "max_deliver": subscription.max_deliver,
        **{name: getattr(info, name) if info else None for name in _COUNTS},
    }


def _print_subscribers(rows: list[dict[str, Any]]) -> None:
    columns = (
        "NAME",
        "RECEIVES",
        "DURABLE",
        "CONCURRENCY",
        "MAX DELIVER",
        "PENDING",
        "UNACKED",
        "REDELIVERED",
    )
    plain_names = ("concurrency", "max_deliver")
    print_table(
        columns,
        [
            (
                row["name"],
                ", ".join(row["filter_subjects"]),
                row["durable"],
                *(row[name] for name in plain_names),
                *("-" if row[name] is None else row[name] for name in _COUNTS),
            )
            for row in rows
        ],
    )


@natspubsub.command("setup", examples=["flask natspubsub setup --dry-run"])
@click.option("--dry-run", is_flag=True, help="Only show what would be done.")
@json_option
def setup_command(state: AppState, dry_run: bool, as_json: bool) -> None:
    """Create the streams that are missing, and add the subjects that they lack.

    Nothing else of an existing stream is changed. Run it when you deploy, if
    NATSPUBSUB_AUTO_SETUP is off.
    """
    with onlooker(state) as broker:
        if state.settings.use_outbox:
            refuse_volatile(broker.stream_info(state.settings.stream), state.settings)
        changes = broker.setup(state.streams(), dry_run=dry_run)
    if as_json:
        print_json([_change(change) for change in changes])
        return
    for change in changes:
        sign, colour = _SIGNS[change.action]
        line = f"{sign} {change.stream}  {_WORDS[change.action]} {change.detail}"
        click.secho(printable(line).rstrip(), fg=colour)
    if dry_run:
        click.echo("Nothing was changed (--dry-run).")


def _change(change: Change) -> dict[str, Any]:
    names = ("action", "stream", "detail")
    return {name: value for name, value in msgspec.structs.asdict(change).items() if name in names}


@natspubsub.command("config", examples=["flask natspubsub config"])
@json_option
def config_command(state: AppState, as_json: bool) -> None:
    """Show each setting, its value and where it came from. Secrets are masked."""
    rows = state.settings.rows()
    if as_json:
        names = ("key", "value", "source")
        print_json([dict(zip(names, row, strict=True)) for row in rows])
    else:
        print_table(("KEY", "VALUE", "SOURCE"), rows)
