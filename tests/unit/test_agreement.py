"""What versions of a subscriber side by side have their consumer be."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from flask_natspubsub.brokers.agreement import (
    HISTORY,
    MAX_HISTORY,
    Needs,
    disjoint,
    history_of,
    is_outdated,
    with_newest,
)
from flask_natspubsub.messages.subjects import covers, overlaps


def needs(*filters: str, ack_wait: float = 30.0, most: int = 1000) -> Needs:
    return Needs(filters, ack_wait, most)


def test_what_both_need() -> None:
    both = needs("a.b", ack_wait=10).joined(needs("a.c", ack_wait=20, most=2000))
    assert both == needs("a.b", "a.c", ack_wait=20, most=2000)
    assert both.covers(needs("a.b", ack_wait=10))
    assert not needs("a.b").covers(both)
    assert needs("a.*").joined(needs("a.b")) == needs("a.*")


def test_one_message_at_a_time_is_what_all_need_if_one_does() -> None:
    both = needs("a", most=1).joined(needs("a", most=2000))
    assert both.max_ack_pending == 1
    assert needs("a", most=2000).missing(both) == ["one message at a time"]


def test_what_is_missing_is_said() -> None:
    have = needs("a.*", ack_wait=10)
    assert have.missing(needs("a.b", "b.c", ack_wait=20)) == ["b.c", "ack_wait 20"]
    assert have.missing(needs("a.b", ack_wait=5, most=5000)) == []


_token = st.sampled_from(["a", "b", "*"])
_subject = st.builds(
    lambda tokens, rest: ".".join([*tokens, *rest]),
    st.lists(_token, min_size=1, max_size=3),
    st.sampled_from([[], [">"]]),
)


@given(st.lists(_subject, min_size=1, max_size=5))
def test_filters_of_one_consumer_never_overlap_and_cover_all_that_was_wanted(
    subjects: list[str],
) -> None:
    found = disjoint(subjects)
    assert all(any(covers(one, wanted) for one in found) for wanted in subjects)
    assert not any(overlaps(one, other) for one, other in itertools.combinations(found, 2))
    assert disjoint(found) == found


def test_the_newest_declaration_is_the_one_that_came_last() -> None:
    old, new = needs("a"), needs("a", "b")
    assert with_newest(old, old, {"team": "x"}) == {"team": "x"}, "one declaration, no history"
    metadata = with_newest(new, old, {"team": "x"})
    assert metadata["team"] == "x"
    assert history_of(metadata) == [old.fingerprint, new.fingerprint]
    assert is_outdated(old, metadata)
    assert not is_outdated(new, metadata)
    assert with_newest(new, new, metadata) == metadata
    assert not is_outdated(needs("c"), metadata), "never seen: newer than all"
    assert not is_outdated(old, {})
    again = with_newest(old, new, metadata)
    assert history_of(again) == [new.fingerprint, old.fingerprint]
    assert is_outdated(new, again)


def test_the_history_does_not_grow_for_ever() -> None:
    metadata: dict[str, str] = {}
    for number in range(50):
        metadata = with_newest(needs(f"a{number}"), needs("a"), metadata)
    assert len(history_of(metadata)) == MAX_HISTORY
    assert len(metadata[HISTORY]) < 150


def test_a_limit_of_the_server_is_no_other_declaration() -> None:
    assert needs("a", most=100).fingerprint == needs("a", most=2000).fingerprint
    assert needs("a", most=1).fingerprint != needs("a", most=2000).fingerprint


def test_the_order_of_filters_is_no_other_declaration() -> None:
    assert needs("a", "b").fingerprint == needs("b", "a").fingerprint
