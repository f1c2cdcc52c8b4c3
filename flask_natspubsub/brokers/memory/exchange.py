"""The inside of the broker in memory: where messages arrive, wait and are handed out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from ...errors import NoStreamForSubject, NotConnected, PublishError, TopologyError
from ...messages.headers import Headers
from ...messages.message import Message, StoredMessage
from ...messages.subjects import matches
from ..agreement import Needs
from ..base import ConsumerConfig, Consumption, CoreSubscription, Delivery, StoredAck
from .clock import Clock, VirtualClock
from .stream import MemoryConsumer, MemoryStream
from .threads import Alarm, HandOver

#: Seconds after which a message comes again that one version of the application does not know.
HAND_BACK = 1.0


class MemoryDelivery(Delivery):
    """A delivery out of a stream in memory."""

    __slots__ = ("_durable", "_exchange")

    def __init__(
        self, exchange: Exchange, durable: str, message: StoredMessage, attempt: int
    ) -> None:
        self.subject = message.subject
        self.headers = message.headers
        self.data = message.data
        self.stream = message.stream
        self.sequence = message.sequence
        self.settled = False
        self._exchange = exchange
        self._durable = durable
        self.attempt = attempt
        self.timestamp = message.timestamp

    @property
    def consumer(self) -> tuple[str, str]:
        """Stream and durable it was delivered to."""
        return self.stream, self._durable

    def ack(self) -> None:
        """Done: never deliver it again."""
        self._exchange.settle(self, lambda consumer, _: consumer.ack(self.sequence), is_ack=True)

    def nak(self, delay: float | None = None) -> None:
        """Deliver it again, after ``delay`` seconds or at once."""
        self._exchange.settle(self, lambda consumer, now: consumer.nak(self.sequence, now, delay))

    def term(self, reason: str = "") -> None:
        """Given up: never deliver it again."""
        self._exchange.settle(self, lambda consumer, _: consumer.forget(self.sequence))

    def in_progress(self) -> None:
        """Still at work: start ``ack_wait`` anew."""
        self._exchange.progress(self)


class MemoryConsumption(Consumption):
    """A pull on a durable consumer in memory."""

    def __init__(
        self, exchange: Exchange, config: ConsumerConfig, deliver: Callable[[Delivery], None]
    ) -> None:
        self.config = config
        self.needs = Needs.of(config)
        self.key = (config.stream, config.durable)
        self.deliver = deliver
        #: How many more messages it may be given.
        self.credits = 0
        self.is_stopped = False
        self._exchange = exchange

    def request(self, count: int) -> None:
        """Ask for ``count`` more messages."""
        self._exchange.request(self, count)

    @property
    def consumer(self) -> tuple[str, str]:
        """Stream and durable that it pulls from."""
        return self.key

    @property
    def ack_wait(self) -> float:
        """Seconds after which what nothing is heard of is delivered again."""
        return self._exchange.ack_wait(self)

    def stop(self, timeout: float = 5.0) -> None:
        """Stop; waits up to ``timeout`` seconds for a delivery that is being handed over."""
        self._exchange.stop_pull(self, timeout)

    @property
    def is_healthy(self) -> bool:
        """Whether it is running and the broker is connected."""
        return not self.is_stopped and self._exchange.is_up


class MemoryListener(CoreSubscription):
    """Interest in a subject of the broker in memory."""

    def __init__(
        self, exchange: Exchange, subject: str, callback: Callable[[Message], None]
    ) -> None:
        self.subject = subject
        self.callback = callback
        self._exchange = exchange

    def stop(self) -> None:
        """Lose interest."""
        self._exchange.stop_listener(self)


class Exchange:
    """Streams, the pulls on their consumers, and listeners, behind one lock.

    Methods that begin with an underscore, and those that say so, want the lock held;
    callbacks run without it.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.lock = threading.Lock()
        self.is_up = True
        self.streams: dict[str, MemoryStream] = {}
        #: How many acks are still to be lost, for tests.
        self.acks_to_drop = 0
        self._pulls: dict[tuple[str, str], deque[MemoryConsumption]] = {}
        self._listeners: list[MemoryListener] = []
        self._hand_over = HandOver(self.lock)
        self._alarm = (
            None if isinstance(clock, VirtualClock) else Alarm(self.lock, clock.now, self.deliver)
        )

    # --- connection

    def require_connection(self) -> None:
        """Raise NotConnected when cut off."""
        if not self.is_up:
            raise not_connected()

    def cut_off(self) -> threading.Thread | None:
        """Stop everything (lock held); what was on its way stays requested.

        :returns: the timer thread, if there was one; it ends by itself.
        """
        self.is_up = False
        for pulls in self._pulls.values():
            for pull in pulls:
                pull.credits += len(self._hand_over.withdraw(pull))
        return self._alarm.cancel() if self._alarm else None

    # --- messages in

    def store(self, message: Message) -> StoredAck | PublishError:
        """Give a message to listeners and its stream (lock held; ``deliver`` is to follow)."""
        for listener in self._listeners:
            if matches(listener.subject, message.subject):
                core = Message(message.subject, message.data, Headers(message.headers))
                self._hand_over.add(listener, listener.callback, core)
        for stream in self.streams.values():
            if stream.stores(message.subject):
                return stream.publish(message, self.clock.now())
        return NoStreamForSubject(
            f"No stream stores the subject {message.subject}.",
            "Run 'flask natspubsub setup', or check NATSPUBSUB_ENV and NATSPUBSUB_APP_NAME.",
        )

    # --- messages out

    def deliver(self) -> None:
        """Hand out whatever can be delivered now."""
        with self.lock:
            for key in self._pulls:
                self._feed(key)
        self._hand_over.run()

    def _feed(self, key: tuple[str, str]) -> None:
        """Queue what a consumer has for its pulls, in turn, and see to what is due later."""
        pulls = self._pulls.get(key)
        if not pulls or not self.is_up:
            return
        consumer = self.streams[key[0]].consumers[key[1]]
        while any(pull.credits for pull in pulls):
            if pulls[0].credits:
                delivery = self.take(consumer)
                if delivery is None:
                    self._set_alarm(consumer)
                    return
                self._give(delivery, consumer, pulls)
            pulls.rotate(-1)

    def _give(
        self, delivery: MemoryDelivery, consumer: MemoryConsumer, pulls: Iterable[MemoryConsumption]
    ) -> None:
        """Hand a message to a pull that subscribes to it, now or when one may have it.

        Where several versions of an application share the consumer, some do not; what none
        subscribes to any more is settled.
        """
        takers = [pull for pull in pulls if pull.needs.wants(delivery.subject)]
        pull = next((one for one in takers if one.credits), None)
        if pull is not None:
            pull.credits -= 1
            self._hand_over.add(pull, pull.deliver, delivery)
            return
        delivery.settled = True
        if takers:
            consumer.nak(delivery.sequence, self.clock.now(), HAND_BACK)
        else:
            consumer.ack(delivery.sequence)

    def _set_alarm(self, consumer: MemoryConsumer) -> None:
        due = consumer.next_due(self.clock.now()) if self._alarm else None
        if self._alarm and due is not None:
            self._alarm.set(due)

    def take(self, consumer: MemoryConsumer) -> MemoryDelivery | None:
        """Deliver one message (lock held); None if there is none to deliver."""
        taken = consumer.take(self.clock.now()) if self.is_up else None
        return MemoryDelivery(self, consumer.config.durable, *taken) if taken else None

    # --- what delivered messages are told

    def settle(
        self,
        delivery: MemoryDelivery,
        change: Callable[[MemoryConsumer, float], None],
        *,
        is_ack: bool = False,
    ) -> None:
        """Make ``change`` to the consumer of ``delivery``, unless it was settled before."""
        with self.lock:
            if delivery.settled:
                return
            delivery.settled = True
            if is_ack and self.acks_to_drop:
                self.acks_to_drop -= 1
                return
            consumer = self.consumer(*delivery.consumer)
            if consumer is None or not self.is_up:
                return
            change(consumer, self.clock.now())
            self._feed(delivery.consumer)
        self._hand_over.run()

    def progress(self, delivery: MemoryDelivery) -> None:
        """Start the ``ack_wait`` of ``delivery`` anew."""
        with self.lock:
            consumer = self.consumer(*delivery.consumer)
            if consumer is not None and self.is_up and not delivery.settled:
                consumer.progress(delivery.sequence, self.clock.now())

    # --- consumers, pulls and listeners

    def consumer(self, stream: str, durable: str) -> MemoryConsumer | None:
        """Return a consumer (lock held); None if there is none."""
        found = self.streams.get(stream)
        return found.consumers.get(durable) if found else None

    def placed(self, config: ConsumerConfig) -> ConsumerConfig:
        """Return the config with the stream that its consumer belongs on (lock held)."""
        own = self.streams.get(config.stream)
        if not config.elsewhere or (own is not None and own.stores_one_of(config.filter_subjects)):
            return config
        for name, stream in self.streams.items():
            if stream.stores_one_of(config.filter_subjects):
                return msgspec.structs.replace(config, stream=name, durable=config.elsewhere)
        return config

    def ack_wait(self, pull: MemoryConsumption) -> float:
        """Return the ack_wait of the consumer of ``pull``."""
        with self.lock:
            consumer = self.consumer(*pull.key)
            return consumer.config.ack_wait if consumer else pull.config.ack_wait

    def add_consumer(self, config: ConsumerConfig) -> MemoryConsumer:
        """Create or update a consumer (lock held); TopologyError if its stream is missing.

        Other versions of the application that pull on it keep what they need.
        """
        needs = Needs.of(config)
        for pull in self._pulls.get((config.stream, config.durable), ()):
            needs = needs.joined(pull.needs)
        config = msgspec.structs.replace(config, **msgspec.structs.asdict(needs))
        stream = self.streams.get(config.stream)
        if stream is None:
            raise TopologyError(
                f"There is no stream {config.stream} for the consumer {config.durable}.",
                "Run 'flask natspubsub setup', or set NATSPUBSUB_AUTO_SETUP to True.",
            )
        return stream.add_consumer(config, self.clock.now())

    def remove_consumer(self, stream: str, durable: str) -> bool:
        """Delete a consumer (lock held), or start it anew where it was if it has pulls."""
        found = self.streams.get(stream)
        removed = found.consumers.pop(durable, None) if found else None
        if removed is None:
            return False
        pulls = self._pulls.get((stream, durable))
        if pulls:
            self.add_consumer(pulls[0].config).start_after(removed.floor)
        return True

    def waiting(self, stream: str, durable: str) -> int:
        """How many pulls of a consumer wait for messages (lock held)."""
        return sum(1 for pull in self._pulls.get((stream, durable), ()) if pull.credits)

    def add_pull(self, pull: MemoryConsumption) -> None:
        """Create or update the consumer of ``pull`` and let it ask for messages."""
        with self.lock:
            self.add_consumer(pull.config)
            self._pulls.setdefault(pull.key, deque()).append(pull)

    def request(self, pull: MemoryConsumption, count: int) -> None:
        """Let ``pull`` be given ``count`` more messages."""
        with self.lock:
            if not pull.is_stopped:
                pull.credits += count
                self._feed(pull.key)
        self._hand_over.run()

    def stop_pull(self, pull: MemoryConsumption, timeout: float) -> None:
        """Give ``pull`` nothing more, and what was on its way to others."""
        with self.lock:
            if pull.is_stopped:
                return
            pull.is_stopped = True
            self._pulls[pull.key].remove(pull)
            for delivery in self._hand_over.withdraw(pull):
                self._hand_back(delivery)
            self._feed(pull.key)
            self._hand_over.wait_for(pull, timeout)
        self._hand_over.run()

    def _hand_back(self, delivery: MemoryDelivery) -> None:
        delivery.settled = True
        consumer = self.consumer(*delivery.consumer)
        if consumer is not None:
            consumer.nak(delivery.sequence, self.clock.now(), None)

    def add_listener(self, listener: MemoryListener) -> None:
        """Give ``listener`` what is sent to its subject from now on."""
        with self.lock:
            self._listeners.append(listener)

    def stop_listener(self, listener: MemoryListener) -> None:
        """Give ``listener`` nothing more."""
        with self.lock:
            if listener in self._listeners:
                self._listeners.remove(listener)
            self._hand_over.withdraw(listener)


def not_connected() -> NotConnected:
    """Return the error of a broker that is closed or cut off."""
    return NotConnected(
        "The broker in memory is closed or was disconnected by a test.",
        "Call reconnect(), or do not use it after shutdown().",
    )
