"""The steps of the demonstration; each prints one line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .client import Answer, Client
from .processes import Processes, Unfinished, flask_command, gunicorn_command, wait_for

#: Seconds within which a step must be seen.
STEP_TIMEOUT = float(os.environ.get("STEP_TIMEOUT") or 20)

TEAPOT, CUP, SAMOVAR = 1, 2, 3

BOLD, DIM, GREEN, RED = "1", "2", "32", "31"


def colour(text: str, code: str) -> str:
    """Return ``text`` in a colour if the output is a terminal and ``NO_COLOR`` is not set."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return f"\033[{code}m{text}\033[0m"


def say(text: str = "") -> None:
    """Print a line and flush it."""
    print(text, flush=True)


def start_web(processes: Processes, client: Client) -> None:
    """Start the web processes and wait until they are ready."""
    processes.start("gunicorn", *gunicorn_command(client.port))
    processes.await_ready("gunicorn", lambda: client.get("/health/ready").status == 200)


def start_worker(processes: Processes) -> None:
    """Start the process that relays the outbox and runs the subscribers."""
    processes.start("worker", *flask_command("natspubsub", "worker"))


class Story:
    """Follows some orders through the shop and counts the steps that were seen.

    :raises Unfinished: (any method) a step was not seen in time; the text names it.
    """

    def __init__(self, client: Client, processes: Processes) -> None:
        self.client = client
        self.processes = processes
        self.steps = 0

    def tell(self) -> None:
        """Run all chapters."""
        self.many_orders()
        self.one_order()
        self.rejected_order()
        self.poison_order()
        self.crash_between()

    # --- chapters

    def many_orders(self) -> None:
        """Place orders from several clients at once."""
        self.chapter("Twelve orders from four clients at once")
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(lambda _: self.client.order(TEAPOT, 1), range(12)))
        accepted = [answer.body["id"] for answer in answers if answer.status == 202]
        self.check("POST /orders", len(accepted) == 12, f"{len(accepted)} of 12 accepted (202)")
        for order_id in accepted:
            self.await_state(order_id, "confirmed")
        self.step("the worker", "12 orders confirmed")

    def one_order(self) -> None:
        """Follow one order."""
        self.chapter("One order, step by step, with the trace id seen at each step")
        before = self.stock(TEAPOT)
        order = self.place_order(TEAPOT, 2)
        trace = order.trace_id
        self.follow(order, "order.created")
        confirmed = self.await_event(order.body["id"], "order.confirmed")
        stock = self.stock(TEAPOT)
        self.check("stock reserved", stock == before - 2, f"Teapot {before} -> {stock}", trace)
        self.show_event(confirmed)
        self.await_state(order.body["id"], "confirmed")
        self.step(f"GET /orders/{order.body['id']}", "confirmed", trace)
        history = self.order(order.body["id"])["history"]
        topics = [entry["topic"] for entry in history]
        one_trace = {entry["trace_id"] for entry in history} == {trace}
        seen = one_trace and topics == ["order.created", "order.confirmed"]
        self.check("audit trail", seen, ", ".join(topics), trace)

    def rejected_order(self) -> None:
        """Place an order that is rejected."""
        self.chapter("An order for more than there is")
        before = self.stock(CUP)
        order = self.place_order(CUP, before + 1)
        self.follow(order, "order.rejected")
        self.await_state(order.body["id"], "rejected")
        left = self.stock(CUP)
        self.check("stock untouched", left == before, f"Cup {left}", order.trace_id)

    def poison_order(self) -> None:
        """Place an order that cannot be handled until the data is corrected."""
        self.chapter("A poison order: nobody knows which warehouse has the Samovar")
        order = self.place_order(SAMOVAR, 1)
        wait_for(self.dead_letters, "a dead letter in dlq list", STEP_TIMEOUT)
        self.step("dead letter", "flask natspubsub dlq list", order.trace_id)
        self.quote(self.processes.flask("natspubsub", "dlq", "list"))
        fixed = self.client.request("PATCH", f"/products/{SAMOVAR}", {"warehouse": "south"})
        self.check(f"PATCH /products/{SAMOVAR}", fixed.status == 200, "warehouse: south")
        replayed = self.processes.flask(
            "natspubsub", "dlq", "replay", "--subscriber", "reserve_stock"
        )
        self.step("replay", "flask natspubsub dlq replay --subscriber reserve_stock")
        self.quote(replayed)
        self.follow(order, "order.confirmed")
        self.await_state(order.body["id"], "confirmed")
        self.step(f"GET /orders/{order.body['id']}", "confirmed", order.trace_id)

    def crash_between(self) -> None:
        """Kill the web process after the commit, before the event is sent."""
        self.chapter("A crash between the commit and the event")
        self.processes.stop("worker")
        self.step("no worker", "nobody relays the outbox")
        order = self.place_order(TEAPOT, 1)
        self.processes.kill("gunicorn")
        self.step("kill -9", "the web processes are gone, the order is committed")
        pending = self.outbox()["pending"]
        self.check("outbox", pending == 2, f"{pending} events wait in the database", order.trace_id)
        self.quote(self.processes.flask("natspubsub", "outbox", "list", "--status", "pending"))
        start_web(self.processes, self.client)
        self.check("audit trail", not self.order(order.body["id"])["history"], "no event yet")
        start_worker(self.processes)
        self.step("worker started", "relays the outbox, runs the subscribers")
        self.follow(order, "order.created")
        self.await_state(order.body["id"], "confirmed")
        self.step(f"GET /orders/{order.body['id']}", "confirmed", order.trace_id)
        wait_for(lambda: not self.outbox()["pending"], "an empty outbox", STEP_TIMEOUT)

    # --- steps

    def place_order(self, product_id: int, quantity: int) -> Answer:
        """Place an order and print the answer."""
        answer = self.client.order(product_id, quantity)
        if answer.status != 202:
            raise Unfinished(f"POST /orders: accepted (got {answer.status}: {answer.body})")
        body = answer.body
        detail = f"202 accepted, order {body['id']} is {body['state']}"
        self.step("POST /orders", detail, answer.trace_id)
        return answer

    def follow(self, order: Answer, topic: str) -> None:
        """Print an event of an order, which must have the trace id of the request."""
        event = self.await_event(order.body["id"], topic)
        if event["trace_id"] != order.trace_id:
            raise Unfinished(f"{topic} with the trace id {order.trace_id} (got {event})")
        self.show_event(event)

    def show_event(self, event: dict[str, Any]) -> None:
        """Print an event from the audit trail."""
        detail = f"stored as message {event['sequence']}, event {event['event_id'][-8:]}"
        self.step(event["topic"], detail, event["trace_id"])

    def await_event(self, order_id: int, topic: str) -> dict[str, Any]:
        """Wait until the audit trail has an event of an order."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found.extend(e for e in self.order(order_id)["history"] if e["topic"] == topic)
            return bool(found)

        wait_for(look, f"{topic} in the trail of order {order_id}", STEP_TIMEOUT)
        return found[0]

    def await_state(self, order_id: int, state: str) -> None:
        """Wait until an order has a state."""
        reached: Callable[[], bool] = lambda: self.order(order_id)["state"] == state  # noqa: E731
        wait_for(reached, f"order {order_id} {state}", STEP_TIMEOUT)

    def order(self, order_id: int) -> dict[str, Any]:
        """Return an order with its history."""
        return dict(self.ask(f"/orders/{order_id}"))

    def stock(self, product_id: int) -> int:
        """Return the stock of a product."""
        return int(next(p["stock"] for p in self.ask("/products") if p["id"] == product_id))

    def ask(self, path: str) -> Any:
        """Return the body of a GET request, which must succeed."""
        answer = self.client.get(path)
        if answer.status != 200:
            raise Unfinished(f"GET {path}: 200 (got {answer.status}: {answer.body})")
        return answer.body

    def dead_letters(self) -> list[Any]:
        """Return the output of ``dlq list --json``."""
        letters: list[Any] = json.loads(self.processes.flask("natspubsub", "dlq", "list", "--json"))
        return letters

    def outbox(self) -> dict[str, Any]:
        """Return the output of ``outbox status --json``."""
        status = self.processes.flask("natspubsub", "outbox", "status", "--json")
        return dict(json.loads(status))

    # --- output

    def chapter(self, title: str) -> None:
        """Print a heading."""
        say(f"\n{colour(title, BOLD)}")

    def step(self, title: str, detail: str, trace_id: str | None = None) -> None:
        """Print a step that was seen."""
        self.steps += 1
        trace = colour(trace_id, DIM) if trace_id else ""
        say(f"{colour(f'{self.steps:4}', GREEN)}  {title:<18} {detail:<46} {trace}".rstrip())

    def check(self, title: str, seen: bool, detail: str, trace_id: str | None = None) -> None:
        """Print a step, or raise ``Unfinished`` if it was not seen."""
        if not seen:
            raise Unfinished(f"{title} (got {detail})")
        self.step(title, detail, trace_id)

    def quote(self, text: str) -> None:
        """Print the output of a command."""
        for line in text.rstrip().splitlines():
            say(colour(f"        {line}", DIM))
