"""``inbox``: which events subscribers remember as handled."""

from __future__ import annotations

import click

from ..app.state import AppState
from .group import natspubsub
from .output import json_option, print_json, print_table
from .purging import older_than_option, purge, yes_option


@natspubsub.group("inbox", examples=["flask natspubsub inbox status"])
def inbox() -> None:
    """Look after the table of events that were handled."""


@inbox.command("status", examples=["flask natspubsub inbox status"])
@json_option
def status_command(state: AppState, as_json: bool) -> None:
    """Count the events that each subscriber remembers as handled."""
    counts = state.require_persistence().inbox.counts()
    if as_json:
        print_json([{"subscriber": name, "events": count} for name, count in counts.items()])
    elif not counts:
        click.echo("The inbox is empty.")
    else:
        print_table(("SUBSCRIBER", "EVENTS"), counts.items())


@inbox.command("purge", examples=["flask natspubsub inbox purge --older-than 30d --yes"])
@older_than_option
@yes_option
@json_option
def purge_command(state: AppState, older_than: float, yes: bool, as_json: bool) -> None:
    """Forget events that were handled long ago.

    One that is delivered again after that is handled again. Relays do this by themselves after
    NATSPUBSUB_INBOX_RETENTION.
    """
    table = state.require_persistence().inbox
    purge(
        table.count_old(older_than),
        lambda: table.purge(older_than),
        "rows of the inbox",
        yes=yes,
        as_json=as_json,
    )
