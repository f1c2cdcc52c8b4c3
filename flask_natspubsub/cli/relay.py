"""``relay``: the process that relays the outbox."""

from __future__ import annotations

import logging
import os

import click

from ..app.state import AppState
from ..text import printable
from ..worker.processes.signals import RelayOnceProcess, WorkerProcess
from .group import Misused, end, natspubsub
from .log import log_to_stderr
from .output import print_json


@natspubsub.command(
    "relay", examples=["flask natspubsub relay", "flask natspubsub relay --once --json"]
)
@click.option("--once", is_flag=True, help="Send what is due, and end.")
@click.option("--json", "as_json", is_flag=True, help="With --once: print one JSON value.")
def relay_command(state: AppState, once: bool, as_json: bool) -> None:
    """Send the outbox, without subscribers, until SIGTERM or Ctrl-C.

    Workers do it too, unless they have --no-relay; of several relays one sends and the others
    stand by. At the end it finishes the batch in hand, gives its leases back and ends with 0.
    A second signal ends it at once. While NATS or the database is down it waits.

    With --once it ends when nothing is due, and fails if NATS or the database is down.
    """
    if as_json and not once:
        raise Misused("--json goes with --once.")
    state.require_persistence()
    log_to_stderr(logging.DEBUG if state.app.debug else logging.INFO)
    if not once:
        _print_banner(state)
        end(WorkerProcess(state.make_relay_worker(), state.close).run())
    relay = state.make_relay()
    process = RelayOnceProcess(relay, state.close)
    code = process.run()
    if as_json:
        print_json({"sent": process.sent})
    else:
        click.echo(f"sent {process.sent}")
    if not relay.is_idle():
        click.echo(
            "Some are left: another relay has their partition; see 'outbox status'.", err=True
        )
    end(code)


def _print_banner(state: AppState) -> None:
    settings = state.settings
    click.echo(
        f"Relay of {settings.app_name} in {settings.env}, process {os.getpid()}\n"
        f"  servers      {printable(settings.safe_urls)}\n"
        f"  stream       {settings.stream}\n"
        f"  partitions   {settings.outbox_partitions}",
        err=True,
    )
