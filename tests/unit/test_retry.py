from __future__ import annotations

import datetime as dt

import pytest

from flask_natspubsub.errors import DatabaseError, DeadLetter, DecodingError, Discard, Retry
from flask_natspubsub.subscribing.retry import (
    Drop,
    GiveUp,
    RetryLater,
    Verdict,
    backoff_delay,
    classify,
    error_text,
)


def middle() -> float:
    """A random number that means no jitter."""
    return 0.5


def verdict_on(error: BaseException, attempt: int = 1, max_deliver: int = 3) -> Verdict:
    return classify(
        error, attempt=attempt, max_deliver=max_deliver, backoff=(1.0, 5.0), random=middle
    )


@pytest.mark.parametrize(("attempt", "expected"), [(1, 1.0), (2, 5.0), (3, 15.0), (9, 15.0)])
def test_backoff_takes_the_delay_of_the_attempt_and_repeats_the_last(
    attempt: int, expected: float
) -> None:
    assert backoff_delay(attempt, [1, 5, 15], middle) == pytest.approx(expected)


@pytest.mark.parametrize(("random", "expected"), [(0.0, 8.0), (1.0, 12.0)])
def test_jitter_is_twenty_percent_either_way(random: float, expected: float) -> None:
    assert backoff_delay(1, [10], lambda: random) == pytest.approx(expected)


def test_no_delay_has_no_jitter() -> None:
    assert backoff_delay(1, [0], lambda: 1.0) == 0


def test_an_ordinary_error_backs_off_until_the_limit() -> None:
    error = ValueError("x")
    assert verdict_on(error, attempt=1) == RetryLater(1.0)
    assert verdict_on(error, attempt=2) == RetryLater(5.0)
    assert verdict_on(error, attempt=3) == GiveUp("handler_error", error)
    assert verdict_on(error, attempt=4) == GiveUp("handler_error", error)


def test_the_only_delivery_allowed_is_also_the_last() -> None:
    error = ValueError("x")
    assert verdict_on(error, attempt=1, max_deliver=1) == GiveUp("handler_error", error)


def test_retry_takes_its_own_delay_without_jitter() -> None:
    verdict = classify(Retry(delay=7), attempt=1, max_deliver=3, backoff=(1.0,), random=lambda: 1.0)
    assert verdict == RetryLater(7.0)


def test_retry_without_a_delay_takes_the_backoff() -> None:
    assert verdict_on(Retry(), attempt=2) == RetryLater(5.0)


def test_retry_at_once_is_not_the_backoff() -> None:
    assert verdict_on(Retry(delay=0)) == RetryLater(0.0)


def test_retry_takes_a_timedelta() -> None:
    delay = dt.timedelta(minutes=1)
    assert verdict_on(Retry(delay=delay)) == RetryLater(60.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf"), "soon", True])
def test_retry_with_no_usable_delay_takes_the_backoff(delay: float) -> None:
    assert verdict_on(Retry(delay=delay)) == RetryLater(1.0)


def test_retry_counts_towards_the_limit() -> None:
    error = Retry(delay=7)
    assert verdict_on(error, attempt=3) == GiveUp("handler_error", error)


def test_a_message_waits_for_the_database_as_long_as_it_takes() -> None:
    assert verdict_on(DatabaseError("locked"), attempt=99) == RetryLater(5.0)


def test_discard_drops_whatever_the_attempt() -> None:
    assert verdict_on(Discard("not ours"), attempt=99) == Drop("not ours")


def test_dead_letter_gives_up_at_the_first_attempt() -> None:
    error = DeadLetter("no such order")
    assert verdict_on(error) == GiveUp("rejected", error)


@pytest.mark.parametrize("reason", ["malformed", "schema"])
def test_undecodable_messages_are_given_up_at_the_first_attempt(reason: str) -> None:
    error = DecodingError("bad", reason=reason)  # type: ignore[arg-type]
    assert verdict_on(error) == GiveUp(reason, error)  # type: ignore[arg-type]


def test_error_text_is_class_and_message() -> None:
    assert error_text(ValueError("no stock")) == "ValueError: no stock"


def test_error_text_of_an_error_without_message_is_its_class() -> None:
    assert error_text(KeyError()) == "KeyError"


def test_error_text_is_one_line_without_control_characters() -> None:
    text = error_text(ValueError("a\r\nb\tc\x00d\x7fe\x85f\u2028g"))
    assert text == r"ValueError: a\r\nb\tc\x00d\x7fe\x85f\u2028g"


def test_error_text_survives_lone_surrogates() -> None:
    assert error_text(ValueError("a\udc80b")) == r"ValueError: a\udc80b"


@pytest.mark.parametrize("character", ["x", "é", "世", "😀", "\n"])
@pytest.mark.parametrize("shift", range(4))
def test_error_text_is_cut_at_1024_bytes_between_characters(character: str, shift: int) -> None:
    text = error_text(ValueError("-" * shift + character * 5000))
    assert 1020 < len(text.encode()) <= 1024
    assert text.startswith("ValueError: ")


def test_error_text_of_an_error_that_cannot_be_shown() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError("broken")

    assert error_text(Broken()) == "Broken: (cannot be shown)"
