"""A client of the shop's HTTP API, without the extension."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """An answer of the shop; ``status`` is 0 if there was none."""

    status: int
    body: Any = None
    trace_id: str | None = None


class Client:
    """Sends requests to the shop at ``127.0.0.1:port``."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str) -> Answer:
        """Send a GET request."""
        return self.request("GET", path)

    def request(
        self, method: str, path: str, body: object = None, key: str | None = None
    ) -> Answer:
        """Send one request and wait for its answer.

        :param key: the ``Idempotency-Key``, so that the request can be repeated.
        """
        headers = {"Content-Type": "application/json"} | ({"Idempotency-Key": key} if key else {})
        data = None if body is None else json.dumps(body)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            return Answer(0)
        finally:
            connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        body = json.loads(content) if is_json else None
        return Answer(response.status, body, response.headers.get("X-Trace-ID"))

    def order(self, product_id: int, quantity: int) -> Answer:
        """Order a product, with one request."""
        return self.request("POST", "/orders", {"product_id": product_id, "quantity": quantity})

    def order_surely(
        self,
        product_id: int,
        quantity: int,
        key: str,
        within: float,
        on_refusal: Callable[[Answer], None] = lambda answer: None,
    ) -> Answer:
        """Order a product, and repeat the request with the same key until it is accepted.

        :param within: seconds after which the last answer is returned.
        :param on_refusal: is called with each answer after which the request is repeated.
        """
        wanted = {"product_id": product_id, "quantity": quantity}
        deadline = time.monotonic() + within
        while True:
            answer = self.request("POST", "/orders", wanted, key)
            if answer.status not in (0, 409, 503) or time.monotonic() > deadline:
                return answer
            on_refusal(answer)
            time.sleep(0.2)
