"""A call of the JetStream API: where it goes, and what its errors are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

from ...errors import BrokerError
from ...messages.codec import decode_value, encode_value
from ..wire import check_subject

STREAM_NOT_FOUND = 10059

Request = Callable[[str, bytes], Awaitable[bytes]]
Json = dict[str, Any]


class ApiError(BrokerError):
    """The JetStream API answered with an error."""

    def __init__(self, verb: str, error: Json) -> None:
        self.description = str(error.get("description", error))
        super().__init__(f"JetStream refused {verb}: {self.description}.")
        self.err_code = int(error.get("err_code", 0))


class Api:
    """Calls the API.

    :param prefix: the first tokens of its subjects; another where JetStream is in a domain or
        in another account.
    """

    def __init__(self, request: Request, prefix: str = "$JS.API") -> None:
        self.prefix = prefix
        self._request = request

    async def call(self, verb: str, body: Json | None = None) -> Json:
        """Call ``$JS.API.<verb>``; ApiError if the server says no."""
        payload = encode_value(body) if body is not None else b""
        subject = check_subject(f"{self.prefix}.{verb}")
        reply = cast(Json, decode_value(await self._request(subject, payload)))
        if "error" in reply:
            raise ApiError(verb, reply["error"])
        return reply

    async def find(self, verb: str, body: Json | None, missing: Sequence[int]) -> Json | None:
        """Call, with None for the error codes that mean that it is not there."""
        try:
            return await self.call(verb, body)
        except ApiError as error:
            if error.err_code in missing:
                return None
            raise

    async def pages(self, verb: str, what: str) -> list[Json]:
        """Return all that a listing has under ``what``; none if there is no such stream."""
        found: list[Json] = []
        while True:
            page = await self.find(verb, {"offset": len(found)}, [STREAM_NOT_FOUND]) or {}
            found += page.get(what) or []
            if len(found) >= page.get("total", 0) or not page.get(what):
                return found

    async def stream(self, name: str) -> Json | None:
        """Return the raw report on a stream."""
        return await self.find(f"STREAM.INFO.{name}", None, [STREAM_NOT_FOUND])
