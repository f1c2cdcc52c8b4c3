"""``outbox``: pending, sent and parked rows."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any

import click
from msgspec.structs import asdict

from ..app.state import AppState
from ..inspection import PartitionLease, outbox_rows, partition_leases
from ..outbox.names import DIALECTS, PARKED, SENT, STATUSES
from .group import Misused, end, natspubsub
from .output import json_option, print_fields, print_json, print_table
from .purging import older_than_option, purge, yes_option

_TIMES = ("available_at", "created_at", "sent_at", "confirmed_at")


@natspubsub.group("outbox", examples=["flask natspubsub outbox status"])
def outbox() -> None:
    """Look after the table of events to send."""


@outbox.command("status", examples=["flask natspubsub outbox status --json"])
@json_option
def status_command(state: AppState, as_json: bool) -> None:
    """Count the rows, and show the relay of each partition.

    "Oldest pending" is how long the oldest row that is due has been waiting. The next relay or
    worker that runs takes a partition that nobody relays.
    """
    store = state.require_persistence().store
    rows, held = outbox_rows(store), partition_leases(store)
    partitions = range(state.settings.outbox_partitions)
    leases = [held.get(number, PartitionLease(number)) for number in partitions]
    if as_json:
        print_json({**asdict(rows), "leases": [asdict(lease) for lease in leases]})
        return
    age = rows.oldest_pending_seconds
    print_fields(
        [
            *((status, getattr(rows, status)) for status in STATUSES),
            ("oldest pending", None if age is None else f"{age:.1f} s"),
        ]
    )
    click.echo()
    print_table(
        ("PARTITION", "RELAYED BY", "SECONDS LEFT"),
        [
            (lease.partition, lease.owner or "nobody", f"{lease.seconds_left:.1f}")
            for lease in leases
        ],
    )


@outbox.command(
    "list",
    examples=[
        "flask natspubsub outbox list --status parked",
        "flask natspubsub outbox list --after 1200 --limit 50 --json",
    ],
)
@click.option("--status", type=click.Choice(STATUSES), help="Only these.  [default: all]")
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, metavar="N",
    help="At most N, the oldest first.",
)  # fmt: skip
@click.option(
    "--after", type=click.IntRange(min=0), default=0, metavar="ID",
    help="Only rows with a higher id, to continue after the last list.",
)  # fmt: skip
@json_option
def list_command(
    state: AppState, status: str | None, limit: int, after: int, as_json: bool
) -> None:
    """List rows, oldest first."""
    rows = state.require_persistence().store.list(status, limit, after)
    if as_json:
        print_json([_as_json(row) for row in rows])
    elif not rows:
        click.echo("No rows.")
    else:
        _print_rows(rows)
        if len(rows) == limit:
            click.echo(f"There may be more: --after {rows[-1]['id']}", err=True)


def _as_json(row: dict[str, Any]) -> dict[str, Any]:
    return row | {name: _time(row[name], "microseconds") for name in _TIMES}


def _time(seconds: float | None, precision: str = "seconds") -> str | None:
    if seconds is None:
        return None
    return dt.datetime.fromtimestamp(seconds, dt.UTC).isoformat(timespec=precision)


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    print_table(
        ("ID", "SINCE (UTC)", "STATUS", "SUBJECT", "EVENT", "KEY", "TRIES", "STORED AS", "ERROR"),
        [
            (
                row["id"],
                (_time(row["created_at"]) or "-")[:19].replace("T", " "),
                row["status"],
                row["subject"],
                row["event_id"][-8:],  # as in the worker's log
                row["ordering_key"] or "-",
                row["attempts"],
                row["stream_sequence"] or "-",
                row["last_error"] or "",
            )
            for row in rows
        ],
    )


@outbox.command(
    "retry",
    examples=["flask natspubsub outbox retry 12 13", "flask natspubsub outbox retry --all"],
)
@click.argument("ids", nargs=-1, type=click.IntRange(min=1), metavar="[ID]...")
@click.option(
    "--all", "everything", is_flag=True, help="All rows that are parked or wait after a refusal."
)
@json_option
def retry_command(state: AppState, ids: tuple[int, ...], everything: bool, as_json: bool) -> None:
    """Send rows again that are parked, or that wait after the server refused them.

    A relay sends them with its next batch. Rows that were sent stay as they are.
    """
    if bool(ids) == everything:
        raise Misused("Which rows? Give ids, or --all.")
    wanted = set(ids)
    count = state.require_persistence().store.retry(None if everything else sorted(wanted))
    if as_json:
        print_json({"action": "retry", "count": count})
    else:
        click.echo(f"to be sent again: {count}")
    if count < len(wanted):
        click.echo("The others are neither parked nor waiting after a refusal.", err=True)
        end(1)


@outbox.command(
    "purge",
    examples=[
        "flask natspubsub outbox purge --older-than 7d",
        "flask natspubsub outbox purge --status parked --older-than 30d --yes",
    ],
)
@click.option(
    "--status", type=click.Choice((SENT, PARKED)), default=SENT, show_default=True,
    help="Which rows.",
)  # fmt: skip
@older_than_option
@yes_option
@json_option
def purge_command(
    state: AppState, status: str, older_than: float, yes: bool, as_json: bool
) -> None:
    """Delete rows that were sent, or parked, long ago.

    Relays delete sent rows by themselves after NATSPUBSUB_OUTBOX_RETENTION. Until then the row
    is the durable copy of its event. Pending rows are never deleted.
    """
    store = state.require_persistence().store
    purge(
        store.count_old(status, older_than),
        lambda: store.purge(status, older_than),
        f"{status} rows",
        yes=yes,
        as_json=as_json,
    )


@outbox.command("ddl", examples=["flask natspubsub outbox ddl --dialect postgresql"])
@click.option(
    "--dialect", type=click.Choice(DIALECTS), help="For this database.  [default: the app's]"
)
def ddl_command(state: AppState, dialect: str | None) -> None:
    """Print the SQL that creates the tables of the outbox, the relay and the inbox.

    Nothing is sent to the database. With Flask-Migrate or db.create_all() it is not needed:
    both know the tables.
    """
    click.echo(state.require_persistence().ddl(dialect))
