"""``worker``: the process that runs subscribers."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..state import AppState
from ..subscribing.subscription import Subscription
from ..worker.process import WorkerProcess
from ..worker.supervisor import Reloader, in_child
from .group import Misused, end, natspubsub
from .output import log_to_stderr, plain

if TYPE_CHECKING:  # it brings asyncio, which most commands do without
    from ..worker.runner import Worker


@natspubsub.command(
    "worker",
    examples=[
        "flask natspubsub worker --concurrency 8",
        "flask natspubsub worker --only send_confirmation --only audit",
        "flask natspubsub worker --burst",
    ],
)
@click.option(
    "--concurrency",
    "-c",
    type=click.IntRange(min=1),
    metavar="N",
    help="Handler threads.  [default: NATSPUBSUB_CONCURRENCY]",
)
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Run this subscriber only; may be repeated.  [default: all]",
)
@click.option("--no-relay", is_flag=True, help="Do not relay the outbox; another process does.")
@click.option("--burst", is_flag=True, help="End when there is nothing left to do.")
@click.option("--reload", is_flag=True, help="Start again when a .py file changes.")
def worker_command(
    state: AppState,
    concurrency: int | None,
    only: tuple[str, ...],
    no_relay: bool,
    burst: bool,
    reload: bool,
) -> None:
    """Run the subscribers until SIGTERM or Ctrl-C.

    Then it takes no more messages, hands back those not begun, gives the others
    NATSPUBSUB_SHUTDOWN_TIMEOUT to be finished, and ends with 0; with 1 if some were not, they
    are delivered again. A second signal ends it at once. While NATS is down it waits.
    """
    if reload and burst:
        raise Misused("--reload and --burst exclude each other.")
    log_to_stderr(logging.DEBUG if state.app.debug else logging.INFO)
    if reload and not in_child():
        # The interpreter's own arguments: also right for "python -m flask".
        command = [sys.executable, *sys.orig_argv[1:]]
        folders = [state.app.root_path, *_packages(Path.cwd())]
        end(Reloader(command, folders, state.settings.shutdown_timeout).run())
    _check_names(state.subscriptions(), only)
    worker = state.extension.make_worker(only, relay=not no_relay, concurrency=concurrency)
    _print_banner(state, worker)
    app = state.app
    end(WorkerProcess(worker, lambda t: state.extension.shutdown(app, t), burst=burst).run())


def _check_names(subscriptions: list[Subscription], only: tuple[str, ...]) -> None:
    if not subscriptions:
        raise click.ClickException(
            "There are no subscribers. List the modules that have them in "
            "NATSPUBSUB_SUBSCRIBERS, such as ['shop.subscribers']."
        )
    known = sorted({one.name for one in subscriptions})
    for name in only:
        if name not in known:
            raise Misused(f"There is no subscriber {name!r}. Known: {', '.join(known)}.")


def _packages(folder: Path) -> list[str]:
    return [str(path.parent) for path in sorted(folder.glob("*/__init__.py"))]


def _print_banner(state: AppState, worker: Worker) -> None:
    settings = state.settings
    concurrency = worker.concurrency
    click.echo(
        f"Worker of {settings.app_name} in {settings.env}, process {os.getpid()}\n"
        f"  servers      {plain(settings.safe_urls)}\n"
        f"  stream       {settings.stream}\n"
        f"  concurrency  {concurrency}\n"
        f"  outbox       {_outbox(state, worker)}\n"
        "  subscribers",
        err=True,
    )
    chosen = [one for one in state.subscriptions() if one.name in worker.subscribers]
    longest = max(len(one.name) for one in chosen)
    for one in chosen:
        receives = ", ".join(one.topics or one.filter_subjects)
        at_once = min(one.concurrency, concurrency)
        click.echo(f"    {one.name.ljust(longest)}  {receives}  ({at_once} at once)", err=True)


def _outbox(state: AppState, worker: Worker) -> str:
    if worker.relays:
        return "relayed by this worker"
    return "none" if state.persistence is None else "not relayed (--no-relay)"
