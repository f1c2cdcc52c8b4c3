"""``inbox``: the table of handled events."""

from __future__ import annotations

import click
from msgspec.structs import asdict

from ..app.state import AppState
from ..inspection import inbox_rows
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
    found = inbox_rows(state.require_persistence().inbox)
    if as_json:
        print_json([asdict(one) for one in found])
    elif not found:
        click.echo("The inbox is empty.")
    else:
        print_table(("SUBSCRIBER", "EVENTS"), [(one.subscriber, one.events) for one in found])


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
