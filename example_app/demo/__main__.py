"""Starts nats-server, gunicorn and a worker, runs the story, and stops them again."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from .client import Client
from .processes import (
    Interrupted,
    Processes,
    Unfinished,
    free_port,
    is_listening,
    nats_server_command,
    stop_on_signals,
    wait_for,
)
from .story import BOLD, GREEN, RED, Story, colour, say, start_web, start_worker


def main() -> int:
    """Run the demonstration; return 0 if every step was seen, otherwise 1."""
    parser = argparse.ArgumentParser(prog="python -m example_app.demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the last step")
    once = parser.parse_args().once
    stop_on_signals()
    with tempfile.TemporaryDirectory(prefix="shop-", ignore_cleanup_errors=True) as folder:
        return run(Path(folder), once=once)


def run(folder: Path, *, once: bool) -> int:
    """Run the demonstration with its files in ``folder``."""
    nats_port = int(os.environ.get("NATS_PORT") or free_port())
    http_port = int(os.environ.get("HTTP_PORT") or free_port())
    with Processes(folder / "logs", environment(folder, nats_port)) as processes:
        try:
            start(processes, folder, nats_port, http_port)
            story = Story(Client(http_port), processes)
            story.tell()
            say(f"\n{colour(f'All {story.steps} steps were seen.', GREEN)}")
            if not once:
                stay(processes, nats_port, http_port, folder)
        except Interrupted:
            say("\nStopping.")
        except Unfinished as missing:
            say(f"\n{colour('Not seen:', RED)} {missing}")
            for name in processes.ended():
                say(f"          {name} running (it ended by itself)")
            say(f"\n{processes.log_tails()}")
            return 1
    return 0


def environment(folder: Path, nats_port: int) -> dict[str, str]:
    """Return the shop's settings as environment variables."""
    return {
        "DATABASE_URL": os.environ.get("DATABASE_URL") or f"sqlite:///{folder / 'shop.db'}",
        "FLASK_NATSPUBSUB_URLS": f"nats://127.0.0.1:{nats_port}",
        # The default backoff would take half a minute.
        "FLASK_NATSPUBSUB_MAX_DELIVER": "3",
        "FLASK_NATSPUBSUB_BACKOFF": "[0.2, 0.5]",
    }


def start(processes: Processes, folder: Path, nats_port: int, http_port: int) -> None:
    """Start all processes and wait until they are ready."""
    say(colour("A shop on a real nats-server", BOLD))
    processes.start("nats-server", *nats_server_command(nats_port, folder / "nats"))
    processes.await_ready("nats-server", lambda: is_listening(nats_port))
    started("nats-server", f"nats://127.0.0.1:{nats_port}")
    processes.flask("init-db")
    start_web(processes, Client(http_port))
    started("gunicorn", f"http://127.0.0.1:{http_port}  (2 processes)")
    start_worker(processes)
    started("worker", "flask --app example_app natspubsub worker")


def started(name: str, address: str) -> None:
    """Print a process that was started."""
    say(f"      {name:<18} {address}")


def stay(processes: Processes, nats_port: int, http_port: int, folder: Path) -> None:
    """Wait for a signal, or for a process to end by itself."""
    shop = f"http://127.0.0.1:{http_port}"
    say(f"\n{colour('The shop stays up until Ctrl-C.', BOLD)}")
    started("shop", f"{shop}/")
    started("health", f"{shop}/health/")
    started("nats", f"nats://127.0.0.1:{nats_port}")
    started("logs", str(folder / "logs"))
    order = '{"product_id": 1, "quantity": 2}'
    say(f"\n      curl {shop}/orders -H 'Content-Type: application/json' -d '{order}'")
    wait_for(processes.ended, "an end", within=float("inf"))
    raise Unfinished("everything running until Ctrl-C")


if __name__ == "__main__":
    sys.exit(main())
