"""Three nats-servers that replicate streams to each other, on the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from contextlib import ExitStack
from typing import Any

from nats.aio.client import Client
from nats.errors import Error

from tests.support.servers import NatsServer
from tests.support.waiting import eventually

SIZE = 3
TRIES = 3
ELECTION_TIMEOUT = 60.0

_quiet = logging.getLogger("tests.support.cluster")


class NatsCluster:
    """Servers that know each other; a context manager that leaves nothing behind.

    :param config: more configuration text, for each of them.
    """

    def __init__(self, config: str = "") -> None:
        self._config = config
        self._stack = ExitStack()
        self.nodes: list[NatsServer] = []

    def __enter__(self) -> NatsCluster:
        for left in reversed(range(TRIES)):
            try:
                self._open()
            except BaseException as error:
                self._stack.close()
                if not left or not isinstance(error, RuntimeError):
                    raise
            else:
                break  # a port may have been taken by another process meanwhile
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _open(self) -> None:
        ports = _free_ports(SIZE)
        routes = ", ".join(f"nats://127.0.0.1:{port}" for port in ports)
        self.nodes = []
        for number, port in enumerate(ports):
            text = f"cluster {{ name: tests, listen: 127.0.0.1:{port}, routes: [{routes}] }}"
            node = NatsServer(f"{self._config}\n{text}", name=f"node{number}")
            self.nodes.append(self._stack.enter_context(node))
        self.await_ready()

    def await_ready(self) -> None:
        """Wait until the nodes have a leader, and each tells its clients of all of them."""
        eventually(self._is_ready, ELECTION_TIMEOUT, "the cluster is not complete", 0.05)

    def _is_ready(self) -> bool:
        if any(len(_info(node).get("connect_urls") or ()) < SIZE for node in self.nodes):
            return False
        answer = self.ask("INFO") or {"error": "no answer"}
        return "error" not in answer

    @property
    def urls(self) -> list[str]:
        """The addresses of all nodes, also of those that are down."""
        return [node.url for node in self.nodes]

    def ask(self, verb: str) -> dict[str, Any] | None:
        """Ask the JetStream API by way of a node that runs; None without an answer."""
        running = next(node for node in self.nodes if node.is_running)
        return asyncio.run(_ask(running.url, f"$JS.API.{verb}"))

    def leader(self, verb: str) -> NatsServer:
        """Wait for a leader, and return it.

        :param verb: what it leads: ``STREAM.INFO.<stream>``, ``CONSUMER.INFO.<stream>.<durable>``.
        """
        return eventually(lambda: self._leader(verb), ELECTION_TIMEOUT, f"no leader: {verb}", 0.05)

    def _leader(self, verb: str) -> NatsServer | None:
        name = ((self.ask(verb) or {}).get("cluster") or {}).get("leader")
        return next((node for node in self.nodes if node.name == name and node.is_running), None)

    def step_down(self, what: str) -> None:
        """Ask a leader to step down, if there is one.

        :param what: ``STREAM.LEADER.STEPDOWN.<stream>``, or the same of a consumer.
        """
        self.ask(what)


def _info(node: NatsServer) -> dict[str, Any]:
    """What a node says first to each client."""
    with socket.create_connection(("127.0.0.1", node.port), timeout=5) as client:
        line = client.makefile("rb").readline()
    greeting: dict[str, Any] = json.loads(line.removeprefix(b"INFO "))
    return greeting


async def _ask(url: str, subject: str) -> dict[str, Any] | None:
    async def ignore(error: Exception) -> None:
        _quiet.debug("%s: %s", url, error)

    client = Client()
    try:
        await client.connect(url, error_cb=ignore, connect_timeout=2, allow_reconnect=False)
        answer: dict[str, Any] = json.loads((await client.request(subject, timeout=2)).data)
    except (Error, OSError, TimeoutError):
        return None
    else:
        return answer
    finally:
        with contextlib.suppress(Exception):
            await client.close()


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
