"""``server``: the bundled nats-server, for development."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from urllib.parse import urlsplit

import click

from ..app.state import AppState
from .group import end, natspubsub

DEFAULT_PORT = 4222


@natspubsub.command("server", examples=["flask natspubsub server --port 4222"])
@click.option(
    "--port",
    "-p",
    type=click.IntRange(1, 65535),
    help="Port to listen on.  [default: the one in NATSPUBSUB_URLS]",
)
@click.option(
    "--store-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where the streams are kept.  [default: nats in the instance folder]",
)
def server_command(state: AppState, port: int | None, store_dir: Path | None) -> None:
    """Run a nats-server with JetStream on this computer, until Ctrl-C.

    It listens on 127.0.0.1 only and asks for no password: for development.
    """
    program = _find_program()
    folder = store_dir or Path(state.app.instance_path) / "nats"
    folder.mkdir(parents=True, exist_ok=True)
    port = port or _port_of(state.settings.urls[0])
    click.echo(f"nats-server on nats://127.0.0.1:{port}, streams in {folder}", err=True)
    options = ["--jetstream", "--addr=127.0.0.1", f"--port={port}", f"--store_dir={folder}"]
    sys.stderr.flush()
    if os.name == "nt":
        end(subprocess.call([program, *options]))  # noqa: S603 - our own program and options
    # Replaces this process, so that signals reach the server directly.
    os.execv(program, [program, *options])  # noqa: S606


def _find_program() -> str:
    name = "nats-server.exe" if os.name == "nt" else "nats-server"
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        if os.access(folder / name, os.X_OK):
            return str(folder / name)
    found = shutil.which(name)
    if found is None:
        raise click.ClickException(
            "There is no nats-server here. pip install 'Flask-NatsPubsub[server]'"
        )
    return found


def _port_of(url: str) -> int:
    parts = urlsplit(url)
    # A websocket port is not where clients of the NATS protocol connect.
    return (parts.port if parts.scheme in ("nats", "tls") else None) or DEFAULT_PORT
