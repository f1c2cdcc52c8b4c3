"""What the JetStream API is asked, and how its answers are put together."""

from __future__ import annotations

import asyncio
from typing import Any

from flask_natspubsub.brokers.jetstream.stream_api import JetStreamApi
from flask_natspubsub.messages.codec import decode_value, encode_value

PAGE = 2


def _report(name: str, **config: Any) -> dict[str, Any]:
    return {"stream_name": "EVENTS", "name": name, "config": {"durable_name": name} | config}


class PagingServer:
    """Answers CONSUMER.LIST as the server does: some at a time, from an offset on."""

    def __init__(self, reports: list[dict[str, Any]]) -> None:
        self.reports = reports
        self.asked: list[int] = []

    async def request(self, subject: str, payload: bytes) -> bytes:
        assert subject == "$JS.API.CONSUMER.LIST.EVENTS"
        query: Any = decode_value(payload)
        self.asked.append(query["offset"])
        page = self.reports[query["offset"] : query["offset"] + PAGE]
        return encode_value({"total": len(self.reports), "consumers": page})


def test_all_pages_of_consumers_are_read_and_only_durables_are_kept() -> None:
    ephemeral = {"stream_name": "EVENTS", "name": "tmp", "config": {"inactive_threshold": 5}}
    server = PagingServer([_report("d"), ephemeral, _report("b"), _report("a"), _report("c")])

    found = asyncio.run(JetStreamApi(server.request).consumers("EVENTS"))

    assert [report["name"] for report in found] == ["a", "b", "c", "d"]
    assert server.asked == [0, 2, 4]
