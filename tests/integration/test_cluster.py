"""Several servers that are one; ``tests/torture/cluster.py`` kills their leaders."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.conftest import MakePubsub
from tests.support.cluster import NatsCluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.real_server

WARNING = "has 1 replica in a cluster of 3"


@pytest.fixture(scope="module")
def cluster() -> Iterator[NatsCluster]:
    """A cluster whose nodes all know of each other."""
    with NatsCluster() as cluster:
        yield cluster


def test_a_stream_that_only_one_of_three_servers_has_is_warned_of_once(
    make_pubsub: MakePubsub, cluster: NatsCluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    pubsub = make_pubsub(urls=cluster.urls)
    eventually(lambda: pubsub.is_connected, 30)
    pubsub.publish("a", {}, timeout=30)
    assert caplog.text.count(WARNING) == 1
    assert "NATSPUBSUB_STREAM_CONFIG" in caplog.text

    pubsub.state().broker().want(pubsub.state().streams())
    assert caplog.text.count(WARNING) == 1


def test_a_stream_that_three_servers_have_outlives_one_that_is_not_in_the_settings(
    make_pubsub: MakePubsub, cluster: NatsCluster, caplog: pytest.LogCaptureFixture
) -> None:
    known = cluster.nodes[0]
    pubsub = make_pubsub(urls=known.url, stream_config={"replicas": 3})
    pubsub.publish("a", {}, event_id="e1", timeout=30)
    info = pubsub.state().broker().stream_info(pubsub.state().settings.stream)
    assert info is not None
    assert info.config.replicas == 3
    assert WARNING not in caplog.text

    known.kill()
    try:
        # The others were named by the one that is gone.
        eventually(lambda: pubsub.is_connected, 30)
        assert pubsub.publish("a", {}, event_id="e1", timeout=30).duplicate
    finally:
        known.start()
        cluster.await_ready()


@pytest.mark.parametrize("how", ["killed", "deposed"])
def test_a_direct_publish_waits_while_its_stream_elects_a_leader(
    make_pubsub: MakePubsub, cluster: NatsCluster, how: str
) -> None:
    """Also the first of a process, which has not seen that there is such a stream."""
    maker = make_pubsub(urls=cluster.urls, stream_config={"replicas": 3})
    stream = maker.publish("a", {}, timeout=30).stream
    leader = cluster.leader(f"STREAM.INFO.{stream}")
    others = [node.url for node in cluster.nodes if node is not leader]
    pubsub = make_pubsub(urls=others, auto_setup=False)
    assert pubsub.is_connected
    try:
        if how == "killed":
            leader.kill()
        else:
            cluster.step_down(f"STREAM.LEADER.STEPDOWN.{stream}")

        receipts = [pubsub.publish("a", {"n": n}, timeout=30) for n in range(20)]
        assert [receipt.sequence for receipt in receipts] == list(range(2, 22))
    finally:
        leader.start()
        cluster.await_ready()
