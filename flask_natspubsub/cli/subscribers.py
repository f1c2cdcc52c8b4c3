"""``subscribers``: the list with the lag of each; renaming and deleting positions."""

from __future__ import annotations

import contextlib
from typing import Any

import click
import msgspec

from ..app.state import AppState
from ..brokers.base import ConsumerInfo
from ..errors import BrokerError
from ..inspection import SubscriberFacts
from ..inspection import subscribers as inspect_subscribers
from ..subscribing.durables import complaints, delete, rename
from ..text import printable
from .group import Misused, natspubsub, onlooker
from .output import json_option, print_json, print_table
from .purging import yes_option

_COUNTS = ("pending", "ack_pending", "redelivered")


@natspubsub.group("subscribers", examples=["flask natspubsub subscribers"], runs_alone=True)
@click.option("--offline", is_flag=True, help="Do not ask the server for counts.")
@json_option
def subscribers(state: AppState, offline: bool, as_json: bool) -> None:
    """List the subscribers and the messages that wait for each; or rename or delete one.

    PENDING messages are not delivered yet, UNACKED ones are delivered and not settled, REDELIVERED
    ones of these more than once. "-": the server has no consumer yet; a worker makes it.
    """
    subscriptions, complained = state.subscriptions(), list[str]()
    if offline:
        found = inspect_subscribers(state.settings, subscriptions)
    else:
        with onlooker(state) as broker:
            found = inspect_subscribers(state.settings, subscriptions, broker)
            with contextlib.suppress(BrokerError):  # the user may see the app's own consumers only
                complained = complaints(broker, state.settings, subscriptions)
    rows = [_row(facts) for facts in found]
    if as_json:
        print_json(rows)
    elif not rows:
        click.echo("There are no subscribers; NATSPUBSUB_SUBSCRIBERS lists modules that have some.")
    else:
        _print_subscribers(rows)
    for line in complained:
        click.secho(printable(f"! {line}"), fg="yellow", err=True)


def _row(facts: SubscriberFacts) -> dict[str, Any]:
    subscription, place, consumer = facts.subscription, facts.place, facts.consumer
    return {
        "name": subscription.name,
        "topics": list(subscription.topics),
        "filter_subjects": list(subscription.filter_subjects),
        "durable": place.durable,
        "stream": place.stream,
        "concurrency": subscription.concurrency,
        "max_deliver": subscription.max_deliver,
        **{name: getattr(consumer, name) if consumer else None for name in _COUNTS},
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


@subscribers.command("rename", examples=["flask natspubsub subscribers rename old_name new_name"])
@click.argument("old")
@click.argument("new")
@json_option
def rename_command(state: AppState, old: str, new: str, as_json: bool) -> None:
    """Give the position and the inbox rows of OLD to the subscriber NEW.

    Stop the workers of both, deploy the new name, run this, and start them: NEW continues where
    OLD stopped. Messages that OLD was handling may be delivered again; an inbox skips them.
    """
    found = {one.name: one for one in state.subscriptions()}
    if new not in found:
        known = ", ".join(sorted(found)) or "none"
        raise Misused(f"The app has no subscriber {new!r}. It has: {known}.")
    if old in found:
        raise Misused(f"The app has a subscriber {old!r}: it was not renamed.")
    persistence = state.persistence_for([found[new]])
    move = persistence.inbox.rename if persistence else lambda app, old, new: 0
    with onlooker(state) as broker:
        done = rename(broker, state.settings, old, found[new], move)
    if as_json:
        print_json(msgspec.structs.asdict(done))
        return
    click.echo(
        f"{printable(old)} is {printable(new)} now: {done.waiting} messages wait, of which up to "
        f"{done.again} were given to the old name; {done.remembered} events are known as handled."
    )
    click.echo(
        f"Its dead letters: flask natspubsub dlq replay --subscriber {printable(old)} "
        f"--to {printable(new)}"
    )


@subscribers.command("delete", examples=["flask natspubsub subscribers delete old_name"])
@click.argument("name")
@yes_option
@json_option
def delete_command(state: AppState, name: str, yes: bool, as_json: bool) -> None:
    """Delete the position of a subscriber: messages that wait for it are not handled.

    Meant for a subscriber that the code does not have any more. One that it has starts again, with
    everything that is stored.
    """
    subscriptions = state.subscriptions()
    declared = any(one.name == name for one in subscriptions)

    def confirm(info: ConsumerInfo) -> None:
        left = info.pending + info.ack_pending
        text = f"{left} messages wait for {printable(name)!r}"
        text += "; a worker will begin anew with all that is stored" if declared else ""
        if not yes and (left or declared):
            click.confirm(f"{text}. Delete it?", abort=True, err=True)

    with onlooker(state) as broker:
        info = delete(broker, state.settings, name, subscriptions, confirm)
    left = info.pending + info.ack_pending
    if as_json:
        print_json({"deleted": info.durable, "not_handled": left})
    else:
        click.echo(f"deleted {printable(info.durable)}; {left} messages are not handled by it")
