"""The common part of ``outbox purge`` and ``inbox purge``: asking, batches, progress."""

from __future__ import annotations

import sys
from collections.abc import Callable

import click

from .group import Misused
from .output import duration, is_terminal, print_json

older_than_option = click.option(
    "--older-than",
    type=duration,
    required=True,
    metavar="AGE",
    help="Only older ones, such as 12h or 7d.",
)
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


def purge(
    total: int, delete_batch: Callable[[], int], what: str, *, yes: bool, as_json: bool
) -> None:
    """Delete rows in short transactions, and print their number.

    :param total: the number of rows to delete; those that become old enough meanwhile are left.
    :param delete_batch: deletes some rows and returns their number; 0 if there are none.
    :param what: the rows in words, for the question.
    """
    _confirm(total, what, yes)
    if is_terminal(sys.stderr):
        with click.progressbar(length=total, label="deleting...", file=sys.stderr) as bar:
            deleted = _delete(total, delete_batch, bar.update)
    else:
        deleted = _delete(total, delete_batch, lambda count: None)
    if as_json:
        print_json({"action": "purge", "deleted": deleted})
    else:
        click.echo(f"deleted {deleted}")


def _delete(total: int, delete_batch: Callable[[], int], tell: Callable[[int], None]) -> int:
    deleted = 0
    while deleted < total and (count := delete_batch()):
        deleted += count
        tell(count)
    return deleted


def _confirm(total: int, what: str, yes: bool) -> None:
    if yes or not total:
        return
    if not is_terminal(sys.stdin):
        raise Misused(f"This would delete {total} {what}; add --yes to do it unasked.")
    click.confirm(f"Delete {total} {what}?", abort=True, err=True)
