"""Scenarios 6 and 7: the whole way from HTTP to the effect, while parts of it are down."""

from __future__ import annotations

import http.client
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from flask_natspubsub import PublishError
from tests.support.processes import Child
from tests.support.servers import free_port
from tests.support.waiting import eventually

from .ledger import Result, count
from .run import Run
from .shop import TOPIC
from .site import Site

CUSTOMERS = 4
#: Seconds from the server's start until a message that was published then is handled.
LONGEST_SILENCE = 10.0


class Shop:
    """The web process, and customers who order at it.

    :param each: orders in one request, and so in one transaction.
    """

    def __init__(self, site: Site, each: int = 1) -> None:
        self._port = free_port()
        self._site = site
        self._each = each
        self._process = site.start_web(self._port)
        #: The answer to each request; 0 if the connection was lost instead.
        self.answers: list[int] = []
        self.times: list[float] = []
        eventually(self._is_up, 30, "no web server")

    def _is_up(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
        except OSError:
            return False
        return True

    def restart(self) -> None:
        """Kill the web processes and start them again."""
        self._process.kill()
        self._process = self._site.start_web(self._port)

    @property
    def accepted(self) -> int:
        """Requests that were answered with 201 so far."""
        return self.answers.count(201)

    def order(self) -> None:
        """Order once; while nobody listens, wait until somebody does."""
        began = time.monotonic()
        answer = None
        while answer is None:
            try:
                answer = self._order()
            except ConnectionRefusedError:
                eventually(self._is_up, 30, "no web server")
        self.answers.append(answer)
        self.times.append(time.monotonic() - began)

    def _order(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.connect()
            connection.request("POST", f"/orders?number={self._each}")
            return connection.getresponse().status
        except ConnectionRefusedError:
            raise
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def orders(self, number: int) -> float:
        """Have the customers order; the median time of an order, in milliseconds."""
        self.times.clear()
        with self.ordering(number):
            pass
        return statistics.median(self.times) * 1000

    @contextmanager
    def ordering(self, number: int) -> Iterator[None]:
        """Have the customers order while the block runs, and wait until all have."""
        with ThreadPoolExecutor(CUSTOMERS) as customers:
            futures = [customers.submit(self.order) for _ in range(number)]
            try:
                yield
            except BaseException:
                customers.shutdown(wait=False, cancel_futures=True)
                raise
            for future in futures:
                future.result()

    def count(self, scenario: str, site: Site) -> Result:
        """Compare the answers, too, with what was committed."""
        result = count(scenario, site, sent=len(self.answers) * self._each)
        unanswered = self.answers.count(0)
        result.facts["unanswered"] = unanswered
        refused = len(self.answers) - unanswered - self.accepted
        result.expect(not refused, f"{refused} requests failed")
        result.expect(
            self.accepted <= result.committed / self._each <= self.accepted + unanswered,
            f"{self.accepted} requests of {self._each} orders were accepted, "
            f"but {result.committed} orders committed",
        )
        return result


def nats_down(run: Run) -> Result:
    """Orders while nats-server is down, and while it is killed and started again."""
    requests = run.size["requests"]
    with Site() as site:
        shop = Shop(site)
        site.start_relay()
        site.start_worker()
        up = shop.orders(requests)
        run.progress("requests", shop.accepted, 3 * requests)
        site.nats.stop()
        down = shop.orders(requests)
        run.progress("requests", shop.accepted, 3 * requests)
        site.nats.start()
        with shop.ordering(requests):
            begin = shop.accepted
            eventually(lambda: shop.accepted > begin + requests // 3, 60)
            site.nats.kill()
            eventually(lambda: shop.accepted > begin + requests * 2 // 3, 60)
            site.nats.start()
        site.finish(120)
        result = shop.count(run.name, site)
        result.facts |= {"ms a request": up, "while down": down}
    return result


def idle_restarts(run: Run) -> Result:
    """One message after each restart of a server whose worker has nothing to do."""
    restarts, published = run.size["restarts"], {}
    with Site() as site:
        site.start_worker(concurrency=1)
        for number in range(restarts):
            run.progress("restarts", number, restarts)
            (site.nats.kill if number % 2 else site.nats.stop)()
            site.nats.start()
            event_id = f"after-{number}"
            published[event_id] = time.time()
            eventually(lambda event_id=event_id: _publish(site, event_id), 60, "not stored")
            eventually(lambda number=number: site.handled > number, 60, "a pull is silent", 0.02)
        site.finish()
        result = count(run.name, site, committed=published)
    result.expect(result.max_delay <= LONGEST_SILENCE, "a message waited too long for its pull")
    return result


def _publish(site: Site, event_id: str) -> bool:
    with site.app.app_context():
        try:
            site.pubsub.publish(TOPIC, {"total": 1}, event_id=event_id, timeout=2)
        except PublishError:
            return False
    return True


def end_to_end(run: Run) -> Result:
    """Orders while worker, relay and nats-server are killed again and again."""
    messages, kills = run.size["messages"], run.size["kills"]
    victims = [("worker", "relay", "nats")[number % 3] for number in range(kills)]
    run.random.shuffle(victims)
    with Site(lease=2) as site:
        shop = Shop(site)
        crew = Crew(site, shop)
        for number, victim in enumerate(victims):
            run.progress("kills", number, kills)
            with shop.ordering(messages // kills):
                # All of the way works, so whichever is killed now was at work.
                _await_more_effects(site)
                crew.replace(victim)
        site.finish(120)
        result = shop.count(run.name, site)
        result.facts |= {f"{name} killed": victims.count(name) for name in sorted(set(victims))}
    return result


def _await_more_effects(site: Site) -> None:
    before = site.handled
    eventually(lambda: site.handled > before, 60, "no more effects")


class Crew:
    """Relays, workers, the web and the server, each of which can be replaced at any moment.

    :param lanes: how many relays there are, and workers.
    """

    def __init__(self, site: Site, shop: Shop, lanes: int = 1) -> None:
        self._site = site
        self._shop = shop
        self._starts: dict[str, Callable[[], Child]] = {
            "relay": site.start_relay,
            "worker": site.start_worker,
        }
        self._children = {
            name: [start() for _ in range(lanes)] for name, start in self._starts.items()
        }

    def replace(self, name: str, lane: int = 0) -> None:
        """Kill one and start it again."""
        if name == "nats":
            self._site.nats.kill()
            self._site.nats.start()
        elif name == "web":
            self._shop.restart()
        else:
            self._children[name][lane].kill()
            self._children[name][lane] = self._starts[name]()
