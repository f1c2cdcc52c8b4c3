"""``worker``: the process that runs subscribers."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click

from ..app.state import AppState
from ..subscribing.subscription import Subscription, choose
from ..text import printable
from ..worker.processes.child import AVAILABLE, Lifeline, adopted, own_command
from ..worker.processes.health_server import HealthServer, Look
from ..worker.processes.reloader import Reloader
from ..worker.processes.signals import WorkerProcess
from ..worker.processes.supervisor import Supervisor
from ..worker.processes.vitals import Heartbeat
from .group import Misused, end, natspubsub
from .log import log_to_stderr


def address(text: str) -> tuple[str, int]:
    """Parse ``8081`` (on loopback) or ``0.0.0.0:8081``; returns host and port."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise click.BadParameter(f"{text!r} is no port; use one such as 8081 or 0.0.0.0:8081.")
    return host or "127.0.0.1", int(port)


class Wanted(NamedTuple):
    """What the command line asks for."""

    only: tuple[str, ...]
    concurrency: int | None
    relay: bool
    burst: bool
    processes: int | None
    health: tuple[str, int] | None


@natspubsub.command(
    "worker",
    examples=[
        "flask natspubsub worker --concurrency 8",
        "flask natspubsub worker --only send_confirmation --only audit",
        "flask natspubsub worker --burst",
        "flask natspubsub worker --processes 4 --health-port 8081",
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
@click.option(
    "--processes",
    "-p",
    type=click.IntRange(min=1),
    metavar="N",
    help="Run N worker processes, and replace those that die or hang.",
)
@click.option(
    "--health-port",
    "health",
    type=address,
    metavar="[HOST:]PORT",
    help="Answer GET /health/live and /health/ready there.  [default host: 127.0.0.1]",
)
def worker_command(state: AppState, reload: bool, no_relay: bool, **options: Any) -> None:
    """Run the subscribers until SIGTERM or Ctrl-C.

    Then it takes no more messages, hands back those not begun, gives the others
    NATSPUBSUB_SHUTDOWN_TIMEOUT to be finished, and ends with 0; with 1 if some were not, they
    are delivered again. A second signal ends it at once. While NATS is down it waits.

    With --burst it ends with 1, and says why, where the tables of the outbox or inbox are missing,
    or where NATS or the database is away for longer than 10 seconds.

    With --processes, each process has NATSPUBSUB_CONCURRENCY handler threads. SIGHUP restarts
    them one after the other. If one dies 5 times within a minute, all end and the exit code is 1.
    """
    wanted = Wanted(relay=not no_relay, **options)
    _check_options(state, wanted, reload=reload)
    lifeline = adopted()
    is_supervised = lifeline is not None and wanted.processes is not None
    level = logging.DEBUG if state.app.debug else logging.INFO
    log = log_to_stderr(level, with_pid=is_supervised)
    if reload and lifeline is None:
        folders = [state.app.root_path, *_packages(Path.cwd())]
        end(Reloader(own_command(), folders, state.settings.shutdown_timeout).run())
    _check_names(state.subscriptions(), wanted.only)
    if wanted.burst and lifeline is None:
        _check_tables(state, wanted)
    if not is_supervised:
        _print_banner(state, wanted)
    if wanted.processes is not None and lifeline is None:
        _run_supervisor(state, wanted, wanted.processes)
    if log is not None:
        state.broker().before_replies(log.flush_before)
    _run_worker(state, wanted, lifeline, None if is_supervised else wanted.health)


def _check_options(state: AppState, wanted: Wanted, *, reload: bool) -> None:
    if reload and wanted.burst:
        raise Misused("--reload and --burst exclude each other.")
    if wanted.processes is None:
        return
    if reload:
        raise Misused("--reload and --processes exclude each other.")
    if not AVAILABLE:
        raise Misused("--processes needs a POSIX system; start several workers instead.")
    if state.settings.urls[0].startswith("memory:"):
        raise Misused(
            "--processes needs a nats-server: each process would have a 'memory://' of its own."
        )


def _run_supervisor(state: AppState, wanted: Wanted, processes: int) -> NoReturn:
    settings = state.settings
    supervisor = Supervisor(
        own_command(),
        processes,
        settings.shutdown_timeout,
        settings.heartbeat_timeout,
        burst=wanted.burst,
    )
    with _answering(wanted.health, supervisor.health):
        end(supervisor.run())


def _run_worker(
    state: AppState, wanted: Wanted, lifeline: Lifeline | None, health: tuple[str, int] | None
) -> NoReturn:
    worker = state.make_worker(wanted.only, relay=wanted.relay, concurrency=wanted.concurrency)
    heartbeat = Heartbeat(worker, lifeline.tell if lifeline else None)
    process = WorkerProcess(
        worker,
        state.close,
        lifeline,
        burst=wanted.burst,
        heartbeat=heartbeat if lifeline or health else None,
    )
    with _answering(health, heartbeat.look), _loaded_for_good():
        end(process.run())


@contextlib.contextmanager
def _loaded_for_good() -> Iterator[None]:
    """Exclude what is loaded by now, which stays, from garbage collection.

    To collect it again and again takes a tenth of the time of quick handlers.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _answering(address: tuple[str, int] | None, look: Look) -> Iterator[None]:
    """Serve the health endpoint, if there is an address for it."""
    if address is None:
        yield
        return
    try:
        server = HealthServer(*address, look)
    except OSError as error:
        where = ":".join(map(str, address))
        raise click.ClickException(
            f"--health-port: cannot listen on {where}: {error.strerror or error}."
        ) from None
    with server:
        click.echo(f"  health       {server.url}", err=True)
        yield


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


def _check_tables(state: AppState, wanted: Wanted) -> None:
    """Refuse a burst that could not end: only a worker without --burst waits for a migration."""
    persistence = state.persistence_for(choose(state.subscriptions(), wanted.only))
    if persistence is not None:
        persistence.require_tables()


def _packages(folder: Path) -> list[str]:
    return [str(path.parent) for path in sorted(folder.glob("*/__init__.py"))]


def _print_banner(state: AppState, wanted: Wanted) -> None:
    settings = state.settings
    concurrency = wanted.concurrency or settings.concurrency
    chosen = choose(state.subscriptions(), wanted.only)
    processes = "" if wanted.processes is None else f"  processes    {wanted.processes}\n"
    click.echo(
        f"Worker of {settings.app_name} in {settings.env}, process {os.getpid()}\n"
        f"  servers      {printable(settings.safe_urls)}\n"
        f"  stream       {settings.stream}\n"
        f"{processes}"
        f"  concurrency  {concurrency}\n"
        f"  outbox       {_outbox(state, chosen, wanted)}\n"
        "  subscribers",
        err=True,
    )
    longest = max(len(one.name) for one in chosen)
    for one in chosen:
        receives = ", ".join(one.topics or one.filter_subjects)
        at_once = min(one.concurrency, concurrency)
        click.echo(f"    {one.name.ljust(longest)}  {receives}  ({at_once} at once)", err=True)


def _outbox(state: AppState, chosen: Sequence[Subscription], wanted: Wanted) -> str:
    if state.persistence_for(chosen) is None:
        return "none"
    if not wanted.relay:
        return "not relayed (--no-relay)"
    return "relayed by this worker" if wanted.processes is None else "relayed by one of them"
