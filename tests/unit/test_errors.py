"""The tree of errors: codes, texts and outcomes."""

from __future__ import annotations

import inspect

import pytest

from flask_natspubsub import errors
from flask_natspubsub.publishing.publisher import PartlyPublished

ALL = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.NatsPubsubError)
]


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [kind.code for kind in [*ALL, PartlyPublished]]

    assert len(set(codes)) == len(codes)
    assert all(code.replace("-", "").isalpha() and code.islower() for code in codes)


@pytest.mark.parametrize("kind", ALL)
def test_an_error_says_what_happened_and_what_to_do(kind: type[errors.NatsPubsubError]) -> None:
    error = kind("It broke.", "Mend it.")

    assert (error.message, error.fix, str(error)) == ("It broke.", "Mend it.", "It broke. Mend it.")
    assert str(kind("It broke.")).startswith("It broke.")
    assert bool(kind("It broke.").fix) == (kind is errors.NotConnected)


@pytest.mark.parametrize("kind", [kind for kind in ALL if issubclass(kind, errors.PublishError)])
def test_a_publish_error_was_not_sent_unless_it_says_otherwise(
    kind: type[errors.PublishError],
) -> None:
    assert kind("x").outcome == "not_sent"


def test_what_may_pass_by_itself_is_temporary() -> None:
    temporary = {kind for kind in ALL if getattr(kind, "temporary", False)}

    assert temporary == {errors.PublishError, errors.NotConnected, errors.CircuitOpen}


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__
    assert all(kind.__name__ in errors.__doc__ for kind in ALL)


def test_a_verdict_is_no_error_of_the_package() -> None:
    for verdict in (errors.Retry(2.0), errors.Discard(), errors.DeadLetter("no")):
        assert isinstance(verdict, errors.HandlerVerdict)
        assert not isinstance(verdict, errors.NatsPubsubError)
    assert errors.Retry(2.0).delay == 2.0
    assert str(errors.DeadLetter("no")) == "no"
