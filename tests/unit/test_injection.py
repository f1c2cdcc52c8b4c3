"""Names, ids and headers made to break out of their place: refused or escaped, never obeyed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st

from flask_natspubsub import NatsPubsubError
from flask_natspubsub.brokers.jetstream.client import text_of
from flask_natspubsub.brokers.wire import frame, header_block, parse_headers
from flask_natspubsub.config.settings import Settings
from flask_natspubsub.messages import envelope as envelopes
from flask_natspubsub.messages import subjects
from flask_natspubsub.messages.envelope import Lineage
from flask_natspubsub.messages.message import StoredMessage
from flask_natspubsub.messages.received import read
from flask_natspubsub.observability import tracing
from flask_natspubsub.observability.tracing import current_lineage
from flask_natspubsub.publishing.draft import Draft
from flask_natspubsub.publishing.publisher import prepare
from flask_natspubsub.subscribing.options import SubscriberOptions
from flask_natspubsub.subscribing.retry import error_text

# What protocols, logs and subjects are taken apart by, more often than chance would have it.
HOSTILE = [*".*>$ \t\r\n\0\x0b\x0c\x1b\x1c\x7f\x85\xa0\u2028\u2029\ufeff\u202e\ud800:-_/aA0é"]
TEXT = st.one_of(
    st.text(st.sampled_from(HOSTILE), max_size=20),
    st.text(max_size=40),
    st.sampled_from(["a\r\nPUB b 0\r\n\r\n", "a b 0\r\n", ">", "*", "a.>", "$JS.API.>", "..", "_"]),
)
TOKEN = re.compile(r"[A-Za-z0-9_-]+")
SETTINGS = Settings.from_config({"NATSPUBSUB_ENV": "test"}, "shop")


def or_refused(call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """What the call returns; None if it refuses, in one line, what it was given."""
    try:
        return call(*arguments, **more)
    except NatsPubsubError as error:
        said = str(error)
    assert said.isprintable()
    return None


# --- subjects


@given(TEXT)
def test_a_topic_stays_below_its_own_app(topic: str) -> None:
    subject = or_refused(subjects.subject_for, "test", "shop", topic)

    if subject is not None:
        assert subject.startswith("test.shop.")
        assert all(TOKEN.fullmatch(token) for token in subject.split("."))
        # As many tokens as were meant: a dot is never made of something else.
        assert subject.count(".") == topic.count(".") + 2


@given(TEXT, TEXT)
def test_a_subscription_selects_nothing_but_its_own_environment(producer: str, topic: str) -> None:
    selected = or_refused(subjects.filter_for, "test", producer, topic)

    if selected is not None:
        tokens = selected.split(".")
        assert tokens[0] == "test"
        assert tokens[1] == producer
        assert producer == "*" or TOKEN.fullmatch(producer)
        assert all(TOKEN.fullmatch(token) or token in ("*", ">") for token in tokens[2:])


@given(TEXT)
def test_a_dead_letter_goes_to_its_own_subscriber(name: str) -> None:
    subject = or_refused(subjects.dead_letter_subject, "test", "shop", name)

    assert subject in (None, f"test.dlq.shop.{name}")
    assert subject is None or len(subject.split(".")) == 4


@given(TEXT)
def test_a_raw_subject_is_one_word(subject: str) -> None:
    taken = or_refused(subjects.check_filter, subject)

    if taken is not None:
        assert taken == subject
        assert taken.isprintable()
        assert len(subject.split()) == 1


@given(TEXT, TEXT)
def test_a_frame_goes_to_one_subject_whoever_makes_it(subject: str, reply: str) -> None:
    made = or_refused(frame, subject, b"", reply)

    if made is not None:
        assert made.count(b"\r\n") == 2
        assert made.decode().splitlines()[0].split() == ["PUB", subject, *reply.split(), "0"]
        assert all(token not in ("", "*", ">") for token in subject.split("."))


@pytest.mark.parametrize("key", ["ENV", "APP_NAME"])
@given(value=TEXT)
def test_the_first_tokens_of_all_subjects_are_tokens(key: str, value: str) -> None:
    settings = or_refused(Settings.from_config, {f"NATSPUBSUB_{key}": value}, "shop")

    assert settings is None or TOKEN.fullmatch(getattr(settings, key.lower()))


@given(TEXT)
def test_the_name_of_any_app_becomes_one_token(name: str) -> None:
    settings = or_refused(Settings.from_config, {}, name)

    assert settings is None or TOKEN.fullmatch(settings.app_name)


@given(TEXT)
def test_the_name_of_a_stream_is_one_token(name: str) -> None:
    settings = or_refused(Settings.from_config, {"NATSPUBSUB_STREAM_NAME": name}, "shop")

    assert settings is None or name == "" or TOKEN.fullmatch(settings.stream)


@given(TEXT)
def test_the_name_of_a_subscriber_becomes_one_token(name: str) -> None:
    options = or_refused(SubscriberOptions.parse, "who", {"name": name})

    assert options is None or TOKEN.fullmatch(subjects.slug(options.name))


# --- headers and ids


@given(TEXT, TEXT)
def test_headers_are_read_back_as_they_were_given(name: str, value: str) -> None:
    headers = or_refused(_checked, {name: value})
    if headers is None:
        return
    block = header_block({"before": "1", name: value, "after": "2"})

    assert block.count(b"\r\n") == 5
    assert parse_headers(block) == {"before": "1", name: value.strip(" \t"), "after": "2"}


def _checked(headers: dict[str, str]) -> dict[str, str]:
    envelopes.check_headers(headers)
    return headers


@pytest.mark.parametrize(
    "key", ["event_id", "trace_id", "correlation_id", "causation_id", "ordering_key"]
)
@given(value=TEXT)
def test_an_id_is_one_printable_word(key: str, value: str) -> None:
    draft = Draft("a", {}, outbox=True, **{key: value})
    prepared = or_refused(prepare, draft, SETTINGS, Lineage())

    assert prepared is None or re.fullmatch(r"[!-~]{1,255}", value)


@given(TEXT, TEXT)
def test_whatever_is_published_is_one_frame(topic: str, text: str) -> None:
    draft = Draft(topic, {"text": text}, message_type=text or None)
    prepared = or_refused(prepare, draft, SETTINGS, Lineage())
    if prepared is None:
        return

    sent = prepared
    block = header_block(sent.headers)
    assert block.count(b"\r\n") == len(sent.headers) + 2
    assert parse_headers(block) == {k: v.strip(" \t\v\f") for k, v in sent.headers.items()}
    assert b"\n" not in sent.data
    assert sent.subject.startswith("test.shop.")


# --- trace ids of requests

W3C = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
HEX = st.text("0123456789abcdef", min_size=1, max_size=40)
TRACEPARENT = st.one_of(
    TEXT,
    st.builds("{}-{}-{}-{}".format, HEX, HEX, HEX, HEX),
    st.from_regex(W3C, fullmatch=True),
    st.from_regex(W3C, fullmatch=True).map(lambda text: text + "\n"),
    st.from_regex(W3C, fullmatch=True).map(str.upper),
)
SITE = Flask("site")
tracing.install(SITE, "X-Trace-ID")


@given(st.none() | TEXT, st.none() | TRACEPARENT)
def test_a_trace_id_from_outside_is_checked_or_replaced(
    header: str | None, traceparent: str | None
) -> None:
    given = {"HTTP_X_TRACE_ID": header, "HTTP_TRACEPARENT": traceparent}
    environ = {key: value for key, value in given.items() if value is not None}
    with SITE.test_request_context(environ_overrides=environ):
        SITE.preprocess_request()
        lineage = current_lineage()

    assert re.fullmatch(r"[A-Za-z0-9._:/+=@-]{1,128}", lineage.trace_id or "")
    if lineage.trace_id != header:
        assert re.fullmatch("[0-9a-f]{32}", lineage.trace_id or "")
    if lineage.traceparent is not None:
        assert lineage.traceparent == traceparent
        assert W3C.fullmatch(traceparent)
        version, trace, span, _ = traceparent.split("-")
        assert version != "ff"
        assert set(trace) != {"0"} != set(span)


@pytest.mark.parametrize("length", [128, 129, 100_000])
def test_a_long_trace_id_is_not_carried_along(length: int) -> None:
    trace_id = tracing.choose_trace_id("a" * length, None)

    assert (trace_id == "a" * length) is (length == 128)


# --- what comes from others


@given(TEXT, TEXT)
def test_what_others_send_is_fit_for_a_log_line(text: str, header: str) -> None:
    clean = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    body = envelopes._ENCODER.encode(
        {"event_id": clean, "topic": clean, "trace_id": clean, "message": {}}
    )

    received = read(StoredMessage("test.shop.a", body, {"Nats-Msg-Id": header}, "s", 1, 0.0))

    for shown in (received.event_id, received.topic, received.trace_id or ""):
        assert len(shown) <= envelopes.MAX_IDENTIFIER_LENGTH
        assert len(f"-{shown}-".splitlines()) == 1
        assert not set(shown) & {*map(chr, range(32)), "\x7f", "\u202e"}


@given(TEXT)
def test_the_text_of_any_error_is_one_printable_line(text: str) -> None:
    assert error_text(ValueError(text)).isprintable()
    assert text_of(OSError(text)).isprintable()
