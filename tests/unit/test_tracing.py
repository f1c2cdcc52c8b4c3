"""The trace id of a request: in, kept, out, logged, and inherited by what is published."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask, Response, stream_with_context
from flask.testing import FlaskClient

from flask_natspubsub import NatsPubsub, TraceIdFilter, current_trace_id
from flask_natspubsub.messages.envelope import Lineage
from flask_natspubsub.observability.tracing import choose_trace_id, current_lineage, within
from tests.conftest import MakePubsub

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.fixture
def pubsub(make_pubsub: MakePubsub) -> NatsPubsub:
    return make_pubsub(urls="memory://", env="test")


@pytest.fixture
def shop(pubsub: NatsPubsub) -> Flask:
    app = pubsub.state().app

    @app.get("/")
    def index() -> dict[str, Any]:
        return {"trace_id": current_trace_id()}

    @app.post("/orders")
    def order() -> str:
        return pubsub.publish("order.created", {}).event_id

    @app.get("/broken")
    def broken() -> str:
        raise ZeroDivisionError

    @app.get("/stream")
    def stream() -> Response:
        @stream_with_context
        def parts() -> Iterator[str]:
            for _ in range(3):
                yield f"{current_trace_id()}\n"

        return Response(parts())

    @app.get("/stream-without-context")
    def bare() -> Response:
        return Response(f"{current_trace_id()}\n" for _ in range(3))

    return app


@pytest.fixture
def http(shop: Flask) -> FlaskClient:
    return shop.test_client()


def get(http: FlaskClient, path: str = "/", **headers: str) -> Any:
    return http.get(path, headers={name.replace("_", "-"): v for name, v in headers.items()})


# --- which id is chosen


def test_the_header_goes_in_and_out(http: FlaskClient) -> None:
    response = get(http, X_Trace_ID="abc-1.2:3/4+5=6@7_8")

    assert response.json == {"trace_id": "abc-1.2:3/4+5=6@7_8"}
    assert response.headers["X-Trace-ID"] == "abc-1.2:3/4+5=6@7_8"


def test_without_a_header_each_request_gets_an_id_of_its_own(http: FlaskClient) -> None:
    ids = [get(http).headers["X-Trace-ID"] for _ in range(20)]

    assert len(set(ids)) == 20
    assert all(len(one) == 32 and int(one, 16) for one in ids)


def test_traceparent_gives_the_id_unless_the_header_does(http: FlaskClient) -> None:
    assert get(http, traceparent=PARENT).json == {"trace_id": TRACE}
    assert get(http, traceparent=PARENT, X_Trace_ID="own").json == {"trace_id": "own"}


@pytest.mark.parametrize(
    "value",
    ["", " ", "a b", "x" * 129, "x" * 10_000, "ü", "a\tb", "<script>", "a;b", "a,b", "{}", "a\x00"],
)
def test_a_header_that_cannot_be_trusted_is_replaced(value: str) -> None:
    chosen = choose_trace_id(value, None)

    assert chosen != value
    assert len(chosen) == 32


@pytest.mark.parametrize("value", ["a\r\nSet-Cookie: b", "a\nb", "a\rb", "a\r\n"])
def test_line_breaks_do_not_get_through(http: FlaskClient, value: str) -> None:
    # A WSGI server never hands these over; one that did must do no harm.
    response = http.get("/", environ_overrides={"HTTP_X_TRACE_ID": value})

    assert response.headers["X-Trace-ID"] not in (value, "a")
    assert "Set-Cookie" not in response.headers


def test_a_header_of_10_kb_is_answered_with_a_new_id(http: FlaskClient) -> None:
    response = get(http, X_Trace_ID="x" * 10_000)

    assert response.status_code == 200
    assert len(response.headers["X-Trace-ID"]) == 32


@pytest.mark.parametrize(
    "value",
    [
        "",
        TRACE,
        PARENT.upper(),
        PARENT.replace("00-", "ff-", 1),
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-00f067aa0ba902b7",
        f" {PARENT}",
        f"{PARENT}\n",
        f"{PARENT}-more",
    ],
)
def test_a_traceparent_that_is_none_is_ignored(shop: Flask, value: str) -> None:
    seen: list[Lineage] = []
    shop.add_url_rule("/seen", view_func=lambda: f"{seen.append(current_lineage())}")

    shop.test_client().get("/seen", environ_overrides={"HTTP_TRACEPARENT": value})

    (lineage,) = seen
    assert lineage.traceparent is None
    assert lineage.trace_id not in (None, TRACE)


def test_the_name_of_the_header_is_a_setting(make_pubsub: MakePubsub) -> None:
    app = make_pubsub(urls="memory://", trace_header="X-Request-ID").state().app
    response = app.test_client().get("/", headers={"X-Request-ID": "r1", "X-Trace-ID": "t1"})

    assert response.headers["X-Request-ID"] == "r1"
    assert "X-Trace-ID" not in response.headers


# --- how long it holds


def test_after_a_request_there_is_none(http: FlaskClient) -> None:
    get(http, X_Trace_ID="t1")

    assert current_trace_id() is None


def test_after_a_request_what_was_in_force_before_is_again(http: FlaskClient) -> None:
    outside = Lineage("outside", "c", "e")
    with within(outside):
        assert get(http, X_Trace_ID="inside").json == {"trace_id": "inside"}
        assert current_lineage() == outside


def test_an_error_has_the_header_too(http: FlaskClient, shop: Flask) -> None:
    shop.config["PROPAGATE_EXCEPTIONS"] = False

    broken, missing = get(http, "/broken", X_Trace_ID="t1"), get(http, "/nothing", X_Trace_ID="t2")

    assert (broken.status_code, broken.headers["X-Trace-ID"]) == (500, "t1")
    assert (missing.status_code, missing.headers["X-Trace-ID"]) == (404, "t2")
    assert current_trace_id() is None


def test_a_request_inside_a_request(http: FlaskClient, shop: Flask) -> None:
    @shop.get("/nested")
    def nested() -> dict[str, Any]:
        inner = get(shop.test_client(), X_Trace_ID="inner").json
        return {"inner": inner["trace_id"], "outer": current_trace_id()}

    assert get(http, "/nested", X_Trace_ID="outer").json == {"inner": "inner", "outer": "outer"}


def test_a_handler_inside_a_request_has_the_ids_of_its_message(shop: Flask) -> None:
    @shop.get("/handling")
    def handling() -> list[str | None]:
        with within(Lineage("message")):
            handled = current_trace_id()
            inner = get(shop.test_client(), X_Trace_ID="inner").json["trace_id"]
            again = current_trace_id()
        return [handled, inner, again, current_trace_id()]

    got = get(shop.test_client(), "/handling", X_Trace_ID="outer").json
    assert got == ["message", "inner", "message", "outer"]


def test_a_request_that_is_only_pushed_has_none(shop: Flask) -> None:
    with shop.test_request_context(headers={"X-Trace-ID": "t1"}):
        assert current_trace_id() is None
        shop.preprocess_request()
        assert current_trace_id() == "t1"
    assert current_trace_id() is None


def test_a_streamed_response_keeps_the_id_to_its_end(http: FlaskClient) -> None:
    response = get(http, "/stream", X_Trace_ID="t1")

    assert response.headers["X-Trace-ID"] == "t1"
    assert response.text == "t1\n" * 3
    assert current_trace_id() is None


def test_a_stream_that_is_not_read_to_its_end_leaves_nothing_behind(http: FlaskClient) -> None:
    response = http.get("/stream", headers={"X-Trace-ID": "t1"}, buffered=False)
    next(iter(response.response))
    response.close()

    assert current_trace_id() is None


def test_a_stream_without_context_keeps_the_id_too(http: FlaskClient) -> None:
    response = get(http, "/stream-without-context", X_Trace_ID="t1")

    assert response.headers["X-Trace-ID"] == "t1"
    assert response.text == "t1\n" * 3
    assert current_trace_id() is None


def test_a_streamed_body_is_closed_once_also_if_nobody_reads_it(shop: Flask) -> None:
    closed = []

    class Body:
        def __iter__(self) -> Iterator[str]:
            return iter(["a"])

        def close(self) -> None:
            closed.append(current_trace_id())

    shop.add_url_rule("/body", view_func=lambda: Response(Body()))

    shop.test_client().get("/body", headers={"X-Trace-ID": "t1"}, buffered=False).close()
    assert closed == ["t1"]
    with get(shop.test_client(), "/body", X_Trace_ID="t2") as response:
        assert response.text == "a"
    assert closed == ["t1", "t2"]


def test_a_client_that_keeps_its_request_keeps_its_id(shop: Flask) -> None:
    with shop.test_client() as http:
        get(http, X_Trace_ID="t1")
        get(http, X_Trace_ID="t2")
        assert current_trace_id() == "t2"

    assert current_trace_id() is None


def test_hooks_of_the_user_see_the_id(pubsub: NatsPubsub, shop: Flask) -> None:
    seen = []
    shop.before_request(lambda: seen.append(current_trace_id()))

    @shop.after_request
    def after(response: Response) -> Response:
        seen.append(current_trace_id())
        return response

    @shop.teardown_request
    def teardown(error: BaseException | None) -> None:
        seen.append(current_trace_id())

    get(shop.test_client(), X_Trace_ID="t1")

    assert seen == ["t1"] * 3


# --- what gets it


def test_what_a_request_publishes_inherits_it(pubsub: NatsPubsub, http: FlaskClient) -> None:
    http.post("/orders", headers={"X-Trace-ID": "t1", "traceparent": PARENT})
    http.post("/orders", headers={"X-Trace-ID": "t2"})

    first, second = pubsub.state().broker().messages("test-events-stream")
    assert (first.headers["trace_id"], first.headers["traceparent"]) == ("t1", PARENT)
    assert json.loads(first.data)["trace_id"] == "t1"
    assert json.loads(second.data)["trace_id"] == "t2"
    assert "traceparent" not in second.headers


def test_the_filter_puts_it_on_every_record(shop: Flask) -> None:
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Lines()
    handler.addFilter(TraceIdFilter())
    handler.setFormatter(logging.Formatter("%(trace_id)s %(message)s"))
    logger = logging.getLogger("tests.tracing")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    @shop.get("/logs")
    def logs() -> str:
        logger.info("inside")
        return ""

    try:
        logger.info("outside")
        get(shop.test_client(), "/logs", X_Trace_ID="t1")
    finally:
        logger.removeHandler(handler)

    assert lines == ["- outside", "t1 inside"]
