"""``outbox verify`` and ``outbox resend``: find lost messages, send them again."""

from __future__ import annotations

import datetime as dt
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
import msgspec

from ..app.state import AppState
from ..inspection import rewound_streams
from ..outbox.verification import SentEvents, Verification
from ..text import printable
from .group import Misused, end, onlooker
from .outbox import outbox
from .output import duration, is_terminal, json_option, print_fields, print_json
from .purging import yes_option

#: Limit of missing events that are listed without --json.
SHOWN = 20


class _When(click.ParamType):  # type: ignore[type-arg]  # generic only in newer clicks
    name = "when"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Return the seconds since the epoch of a time, or of a duration before now."""
        try:
            moment = dt.datetime.fromisoformat(value)
        except ValueError:
            try:
                return time.time() - duration(value)
            except click.BadParameter:
                self.fail(f"{value!r} is no time; use one such as 2h or 2026-01-31T12:00Z.")
        return moment.replace(tzinfo=moment.tzinfo or dt.UTC).timestamp()


_SINCE = "Only rows sent since a time (UTC by default) or within a duration such as 2h."


@contextmanager
def _shown(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar if stderr is a terminal."""
    if not is_terminal(sys.stderr):
        yield lambda count: None
        return
    with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
        yield bar.update


@outbox.command(
    "verify",
    examples=[
        "flask natspubsub outbox verify --since 2h",
        "flask natspubsub outbox verify --full --json",
    ],
)
@click.option("--since", type=_When(), metavar="WHEN", help=_SINCE)
@click.option("--full", is_flag=True, help="Check every row, not a sample of the older ones.")
@json_option
def verify_command(state: AppState, since: float | None, full: bool, as_json: bool) -> None:
    """Check that the streams still have the messages that were sent.

    Fetches each message by its sequence and compares the event id: the newest 1,000 rows and 1 in
    100 of the others, or all with --full. "Expired" messages are older than the stream's max_age.
    The exit code is 1 if a message is missing, or a loss was noticed and is not repaired.
    """
    store = state.require_persistence().store
    with onlooker(state) as broker:
        events = SentEvents(store, broker)
        with _shown(events.count(since), "comparing...") as progress:
            found = events.verify(since, full=full, progress=progress)
    if as_json:
        print_json(msgspec.to_builtins(found))
    else:
        _print_found(found, full)
    if found.missing or found.rewound:
        end(1)


def _print_found(found: Verification, full: bool) -> None:
    counts = ("rows", "checked", "present", "expired")
    print_fields([*((name, getattr(found, name)) for name in counts)])
    print_fields([("missing", len(found.missing))])
    for event_id in found.missing[:SHOWN]:
        click.echo(f"  {printable(event_id)}")
    if len(found.missing) > SHOWN:
        click.echo(f"  and {len(found.missing) - SHOWN} more; --json lists all")
    if found.missing:
        click.echo("'outbox resend --missing-only' sends them again.", err=True)
    for name in found.rewound:
        more = "" if found.missing or full else "; look at all with --full"
        click.echo(
            f"The stream {printable(name)!r} is known to have lost messages{more}.", err=True
        )


@outbox.command(
    "resend",
    examples=[
        "flask natspubsub outbox resend --since 2h --missing-only",
        "flask natspubsub outbox resend --since 2026-01-31T12:00Z --dry-run",
    ],
)
@click.option("--since", type=_When(), metavar="WHEN", help=_SINCE)
@click.option("--missing-only", is_flag=True, help="Only messages that the stream does not have.")
@click.option("--dry-run", is_flag=True, help="Only print their number.")
@yes_option
@json_option
def resend_command(
    state: AppState,
    since: float | None,
    missing_only: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Send events again, with the same event ids.

    Rows that were sent become pending, and the next relay sends them. Subscribers with the inbox
    see no second effect; those without handle again what they have handled before. Needs --since,
    or --missing-only to go through everything that is kept.
    """
    if since is None and not missing_only:
        raise Misused("Which rows? Give --since, or --missing-only.")
    store = state.require_persistence().store
    with onlooker(state) as broker:
        events = SentEvents(store, broker)
        total = events.count(since)
        if not (dry_run or missing_only):
            _confirm(total, yes)
        with _shown(total, "going through them...") as progress:
            count = events.resend(
                since, missing_only=missing_only, dry_run=dry_run, progress=progress
            )
    if as_json:
        print_json({"action": "resend", "count": count, "dry_run": dry_run})
    elif dry_run:
        click.echo(f"would be sent again: {count} (--dry-run)")
    else:
        click.echo(f"to be sent again: {count}")
    left = rewound_streams(store)
    if left and not dry_run:
        names = ", ".join(printable(stream.name) for stream in left)
        click.echo(f"More is missing: {names}. Use --missing-only without --since.", err=True)
        end(1)


def _confirm(total: int, yes: bool) -> None:
    if yes or not total or not is_terminal(sys.stdin):
        return
    click.confirm(f"Send {total} events again?", abort=True, err=True)
