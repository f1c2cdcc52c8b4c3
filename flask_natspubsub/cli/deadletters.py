"""``dlq``: list, show, replay and discard dead letters."""

from __future__ import annotations

import base64
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from ..app.state import AppState
from ..deadletters.reader import ANY_APP, DeadLetterRecord, DeadLetters, checked_id
from ..errors import DecodingError, NatsPubsubError, NotConnected
from ..messages.codec import decode_value
from ..messages.headers import for_json, pairs_of
from ..text import printable
from .group import Misused, end, natspubsub, onlooker
from .output import duration, is_terminal, json_option, print_fields, print_json, print_table

Command = Callable[..., Any]

_FIELDS = (
    "id",
    "app",
    "subscriber",
    "topic",
    "reason",
    "error",
    "traceback",
    "deliveries",
    "event_id",
    "trace_id",
    "original_subject",
    "original_stream",
    "original_sequence",
    "dead_lettered_at",
)


@natspubsub.group("dlq", examples=["flask natspubsub dlq list --subscriber audit --newer-than 1h"])
def dlq() -> None:
    """Look after the messages that were given up on."""


def _all_of(*options: Command) -> Command:
    """Return one decorator for several options."""

    def decorate(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_whose = _all_of(
    click.option("--app", metavar="NAME", help="Those of another app.  [default: this app]"),
    click.option("--all-apps", is_flag=True, help="Those of all apps of the environment."),
)
_filters = _all_of(
    _whose,
    click.option(
        "--peers",
        is_flag=True,
        help="Also those that the JavaScript and Ruby packages store among the events, where "
        "everybody who may publish can write.",
    ),
    click.option("--subscriber", metavar="NAME", help="Only those of this subscriber."),
    click.option("--topic", help="Only those of this topic; may have wildcards."),
    click.option("--older-than", type=duration, help="Only older ones, such as 10m."),
    click.option("--newer-than", type=duration, help="Only newer ones, such as 2h."),
    click.option(
        "--limit",
        type=click.IntRange(min=1),
        metavar="N",
        help="At most N, the oldest first.  [default: all]",
    ),
)


@dlq.command("list", examples=["flask natspubsub dlq list --subscriber audit --newer-than 1h"])
@_filters
@click.option(
    "--after", type=checked_id, metavar="ID", help="Only those after this one: the next page."
)
@json_option
def list_command(
    state: AppState, as_json: bool, app: str | None, all_apps: bool, **filters: Any
) -> None:
    """List the app's dead letters, oldest first.

    Where the app has none, those of the other apps are listed; with --app they are not.
    """
    with onlooker(state):
        letters = state.dead_letters
        records = list(letters.list(app=_app(app, all_apps), **filters))
        if not (records or app or all_apps):
            records = list(letters.list(app=ANY_APP, **filters))
            if records:
                click.echo(f"None of {state.settings.app_name!r}; of other apps:", err=True)
    if as_json:
        print_json([_summary(record) for record in records])
    elif not records:
        click.echo("No dead letters.")
    else:
        _print_records(records)


def _app(app: str | None, all_apps: bool) -> str | None:
    if app and all_apps:
        raise Misused("--app and --all-apps exclude each other.")
    return ANY_APP if all_apps else app


def _summary(record: DeadLetterRecord) -> dict[str, Any]:
    fields = {name: getattr(record, name) for name in _FIELDS}
    return {**fields, "stored_at": record.stored_at.isoformat(), "size": len(record.data)}


def _print_records(records: Iterable[DeadLetterRecord]) -> None:
    print_table(
        ("ID", "SINCE (UTC)", "APP", "SUBSCRIBER", "TOPIC", "EVENT", "TRIES", "REASON", "ERROR"),
        [
            (
                record.id,
                f"{record.stored_at:%Y-%m-%d %H:%M:%S}",
                record.app,
                record.subscriber,
                record.topic,
                record.event_id[-8:],  # as in the worker's log
                record.deliveries,
                record.reason,
                record.error,
            )
            for record in records
        ],
    )


@dlq.command(
    "show",
    examples=["flask natspubsub dlq show 12", "flask natspubsub dlq show 12 --raw > body.json"],
)
@click.argument("record_id", metavar="ID")
@click.option("--raw", is_flag=True, help="Write the body only, byte for byte, to a file.")
@json_option
def show_command(state: AppState, record_id: str, raw: bool, as_json: bool) -> None:
    """Show one dead letter of any app: its reason, its headers and its body."""
    if raw and as_json:
        raise Misused("--raw and --json exclude each other.")
    if raw and is_terminal(sys.stdout):
        raise Misused("--raw may write what harms a terminal; add: > body")
    with onlooker(state):
        letters = state.dead_letters
        (record,) = _get(letters, [record_id], ANY_APP)
        body = letters.body(record)
    if raw:
        sys.stdout.buffer.write(body)
    elif as_json:
        headers = for_json(record.headers)
        print_json({**_summary(record), "headers": headers, **_json_body(body)})
    else:
        print_fields((name.replace("_", " "), value) for name, value in _summary(record).items())
        click.echo("\nheaders")
        print_fields(sorted(pairs_of(record.headers)), indent="  ")
        click.echo(f"\nbody\n{_readable(body)}")


def _get(letters: DeadLetters, ids: Iterable[str], app: str | None) -> list[DeadLetterRecord]:
    records = []
    for record_id in dict.fromkeys(ids):
        record = letters.get(record_id, app=app)
        if record is None:
            raise click.ClickException(_no_such_letter(letters, record_id))
        records.append(record)
    return records


def _no_such_letter(letters: DeadLetters, record_id: str) -> str:
    other = letters.get(record_id, app=ANY_APP)
    if other is not None:
        return f"The dead letter {record_id} is of the app {other.app!r}: add --app {other.app}."
    return f"There is no dead letter {printable(record_id)!r}. 'dlq list' has their ids."


def _json_body(body: bytes) -> dict[str, Any]:
    try:
        return {"body": decode_value(body), "body_base64": None}
    except DecodingError:
        return {"body": None, "body_base64": base64.b64encode(body).decode()}


def _readable(body: bytes) -> str:
    try:
        text = json.dumps(decode_value(body), indent=2, ensure_ascii=False)
    except DecodingError:
        text = body.decode("utf-8", "backslashreplace")
    return "\n".join(printable(line) for line in text.split("\n"))


_bulk_options = _all_of(
    click.argument("ids", nargs=-1, metavar="[ID]..."),
    _filters,
    click.option("--all", "everything", is_flag=True, help="All there are."),
    click.option("--dry-run", is_flag=True, help="Only show which ones it would be."),
    click.option("--yes", "-y", is_flag=True, help="Do not ask, however many they are."),
    click.option(
        "--rate",
        type=click.FloatRange(min=0, min_open=True),
        metavar="N",
        help="At most N a second.  [default: no limit]",
    ),
    json_option,
)


@dlq.command(
    "replay",
    examples=[
        "flask natspubsub dlq replay 12 13",
        "flask natspubsub dlq replay --subscriber audit --newer-than 1h --rate 50",
        "flask natspubsub dlq replay --all --yes",
    ],
)
@_bulk_options
@click.option(
    "--force", is_flag=True, help="Handle them even if the inbox says that they were handled."
)
@click.option("--to", metavar="NAME", help="To this subscriber, such as one that was renamed.")
def replay_command(state: AppState, force: bool, to: str | None, **options: Any) -> None:
    """Send dead letters again, each to the subscriber that gave it up, and remove them.

    Which ones: their ids, or filters, or --all of this app's. What fails once more becomes a
    dead letter again and is not replayed a second time by the same command.
    """
    _in_bulk(
        state,
        "replay",
        lambda letters, record: letters.replay(record, force=force, to=to),
        **options,
    )


@dlq.command(
    "discard",
    examples=[
        "flask natspubsub dlq discard 12",
        "flask natspubsub dlq discard --older-than 7d --dry-run",
    ],
)
@_bulk_options
def discard_command(state: AppState, **options: Any) -> None:
    """Delete dead letters for good.

    Which ones: their ids, or filters, or --all of this app's.
    """
    _in_bulk(state, "discard", lambda letters, record: letters.discard(record), **options)


def _in_bulk(
    state: AppState,
    verb: str,
    action: Callable[[DeadLetters, DeadLetterRecord], object],
    *,
    dry_run: bool,
    yes: bool,
    rate: float | None,
    as_json: bool,
    app: str | None,
    all_apps: bool,
    **which: Any,
) -> None:
    _check_choice(verb, **which)
    with onlooker(state):
        letters = state.dead_letters
        records = _chosen(letters, app=_app(app, all_apps), **which)
        if dry_run:
            _report_dry_run(verb, records, as_json)
            return
        _confirm(verb, len(records), yes)
        failed = _apply(records, lambda record: action(letters, record), verb, rate)
    _report(verb, records, failed, as_json)


def _check_choice(
    verb: str, *, ids: tuple[str, ...], everything: bool, peers: bool, **filters: Any
) -> None:
    filtered = any(value is not None for value in filters.values())
    if ids and (filtered or everything):
        raise Misused("Give either ids or filters, not both.")
    if not (ids or filtered or everything):
        raise Misused(f"Which dead letters? Give ids, a filter, or --all to {verb} all of them.")


def _chosen(
    letters: DeadLetters, *, ids: tuple[str, ...], everything: bool, app: str | None, **filters: Any
) -> list[DeadLetterRecord]:
    """Return all at once: one that fails again meanwhile becomes another dead letter."""
    return _get(letters, ids, app) if ids else list(letters.list(app=app, **filters))


def _confirm(verb: str, count: int, yes: bool) -> None:
    if yes or count < 2:
        return
    if not is_terminal(sys.stdin):
        raise Misused(f"This would {verb} {count} dead letters; add --yes to do it unasked.")
    click.confirm(f"{verb.capitalize()} {count} dead letters?", abort=True, err=True)


def _apply(
    records: Sequence[DeadLetterRecord],
    action: Callable[[DeadLetterRecord], object],
    verb: str,
    rate: float | None,
) -> dict[str, str]:
    """Apply ``action`` to each; return the errors of those that failed, by id."""
    failed: dict[str, str] = {}
    visible = len(records) > 1 and is_terminal(sys.stderr)
    progress: Any = (
        click.progressbar(records, label=f"{verb}...", file=sys.stderr)
        if visible
        else contextlib.nullcontext(records)
    )
    with progress as bar:
        for number, record in enumerate(bar):
            if rate is not None and number:
                time.sleep(1 / rate)
            try:
                action(record)
            except NotConnected as error:
                # The others would fail the same way, each after a long wait.
                failed |= {left.id: str(error) for left in records[number:]}
                break
            except NatsPubsubError as error:
                failed[record.id] = str(error)
    return failed


def _report_dry_run(verb: str, records: Sequence[DeadLetterRecord], as_json: bool) -> None:
    if as_json:
        print_json({"action": verb, "dry_run": True, "ids": [record.id for record in records]})
        return
    if records:
        _print_records(records)
    click.echo(f"Would {verb} {len(records)}; nothing was changed (--dry-run).")


def _report(
    verb: str, records: Sequence[DeadLetterRecord], failed: dict[str, str], as_json: bool
) -> None:
    past = {"replay": "replayed", "discard": "discarded"}[verb]
    done = [record.id for record in records if record.id not in failed]
    if as_json:
        errors = [{"id": key, "error": error} for key, error in failed.items()]
        print_json({"action": verb, "dry_run": False, "ids": done, "failed": errors})
    else:
        for key, error in failed.items():
            click.echo(f"{printable(key)}: {printable(error)}", err=True)
        click.echo(f"{past} {len(done)}, failed {len(failed)}")
    end(1 if failed else 0)
