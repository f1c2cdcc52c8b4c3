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
