"""``setup`` and ``config``: the streams that the app needs, and its settings."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from ..app.state import AppState
from ..brokers.base import Change
from ..brokers.topology import refuse_volatile
from ..text import printable
from .group import natspubsub, onlooker
from .output import json_option, print_json, print_table

_SIGNS = {
    "create": ("+", "green"),
    "add_subjects": ("~", "green"),
    "differs": ("!", "yellow"),
    "ok": ("=", None),
}
_WORDS = {"create": "create with", "add_subjects": "add", "differs": "differs:", "ok": ""}


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
