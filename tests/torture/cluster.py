"""Scenario: a cluster of three, whose leaders are killed and deposed under load."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable

from flask_natspubsub import PublishError
from tests.support.cluster import NatsCluster
from tests.support.waiting import eventually, for_seconds

from .ledger import Result, count
from .run import Run
from .shop import SUBSCRIBER, TOPIC
from .site import Site

AT_ONCE = 8
PAUSE = 0.03
PATIENCE = 120.0


class Load:
    """Publishes directly and through the outbox, in turn, until the block is left."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load")
        #: What was acknowledged without the outbox, and when it was published.
        self.direct: dict[str, float] = {}
        self.retries = 0
        self._problem: BaseException | None = None

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "a publish hangs"
        if self._problem is not None:
            raise self._problem

    @property
    def committed(self) -> dict[str, float]:
        """All that was accepted, and when."""
        rows = dict(self._site.rows("SELECT event_id, created_at FROM natspubsub_outbox"))
        return {**rows, **self.direct}

    def _run(self) -> None:
        try:
            while not self._stopped.wait(PAUSE):
                self._site.publish(AT_ONCE)
                ids = [uuid.uuid4().hex for _ in range(AT_ONCE)]
                now = time.time()
                eventually(lambda ids=ids: self._publish(ids), PATIENCE, "nothing can be published")
                self.direct |= dict.fromkeys(ids, now)
        except BaseException as error:  # raised again where the block is left
            self._problem = error

    def _publish(self, ids: list[str]) -> bool:
        messages = [(TOPIC, {"total": 1}, {"event_id": one}) for one in ids]
        try:
            with self._site.app.app_context():
                self._site.pubsub.publish_many(messages, timeout=3)
        except PublishError:
            self.retries += 1
            return False
        return True


class Cluster:
    """What can befall the leaders of the shop's stream and of its consumer."""

    def __init__(self, site: Site, nodes: NatsCluster) -> None:
        stream = site.state.settings.stream
        (subscription,) = site.state.subscriptions()
        self._site, self._nodes = site, nodes
        self._stream = stream
        self._consumer = f"{stream}.{subscription.durable}"
        self.faults: dict[str, Callable[[], None]] = {
            "stream leader killed": lambda: self._kill(f"STREAM.INFO.{self._stream}"),
            "stream leader deposed": lambda: self._depose("STREAM", self._stream),
            "consumer leader killed": lambda: self._kill(f"CONSUMER.INFO.{self._consumer}"),
            "consumer leader deposed": lambda: self._depose("CONSUMER", self._consumer),
        }

    def _kill(self, verb: str) -> None:
        node = self._nodes.leader(verb)
        node.kill()
        self.await_effects()  # the two that are left do without it
        node.start()

    def _depose(self, kind: str, what: str) -> None:
        self._nodes.leader(f"{kind}.INFO.{what}")
        self._nodes.step_down(f"{kind}.LEADER.STEPDOWN.{what}")

    def await_effects(self) -> None:
        """Wait until messages that were published after this are handled."""
        begin = time.time()
        query = f"SELECT count(*) FROM effect WHERE subscriber = '{SUBSCRIBER}' AND at > {begin}"
        eventually(lambda: self._site.number(query) > AT_ONCE, PATIENCE, "no more effects", 0.1)

    def down_for(self, seconds: float) -> None:
        """Leave one node down, and depose the others meanwhile."""
        node = self._nodes.nodes[0]
        node.kill()
        for_seconds(seconds, self.faults["stream leader deposed"], max(1.0, seconds / 10))
        self.await_effects()
        node.start()

    def heal(self) -> None:
        """Wait until all have a leader again."""
        self._nodes.leader(f"STREAM.INFO.{self._stream}")
        self._nodes.leader(f"CONSUMER.INFO.{self._consumer}")


def leaders_killed(run: Run) -> Result:
    """Kill and depose the leaders of stream and consumer in turn, while two ways publish."""
    rounds, down = run.size["rounds"], run.size["down_s"]
    nodes = NatsCluster()
    with Site(nats=nodes, lease=2, stream_config={"replicas": 3}) as site:
        site.start_relay()
        site.start_worker()
        cluster = Cluster(site, nodes)
        faults = list(cluster.faults)
        with Load(site) as load:
            cluster.await_effects()
            for number in range(rounds):
                run.progress("faults", number, rounds)
                cluster.faults[faults[number % len(faults)]]()
                cluster.await_effects()
            if down:
                cluster.down_for(down)
        cluster.heal()
        site.finish(PATIENCE)
        result = count(run.name, site, committed=load.committed)
        result.facts |= {"faults": rounds, "direct": len(load.direct), "retries": load.retries}
    return result
