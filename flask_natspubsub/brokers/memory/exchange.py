"""Delivers messages of the broker in memory to pulls and listeners."""

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

#: Seconds until a message is redelivered if no pull that subscribes to it has requested one.
HAND_BACK = 1.0


class MemoryDelivery(Delivery):
    """A delivery from a stream in memory."""

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
        """The stream and durable to which the message was delivered."""
        return self.stream, self._durable

    def ack(self) -> None:
        """Acknowledge the message: it is done."""
        self._exchange.settle(self, lambda consumer, _: consumer.ack(self.sequence), is_ack=True)

    def nak(self, delay: float | None = None) -> None:
        """Redeliver the message, after ``delay`` seconds or at once."""
        self._exchange.settle(self, lambda consumer, now: consumer.nak(self.sequence, now, delay))

    def term(self, reason: str = "") -> None:
        """Give the message up: it is never delivered again."""
        self._exchange.settle(self, lambda consumer, _: consumer.forget(self.sequence))

    def in_progress(self) -> None:
        """Restart ``ack_wait``, because the message is still being handled."""
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
        #: The number of messages that were requested and not delivered yet.
        self.credits = 0
        self.is_stopped = False
        self._exchange = exchange

    def request(self, count: int) -> None:
        """Request ``count`` more messages."""
        self._exchange.request(self, count)

    @property
    def consumer(self) -> tuple[str, str]:
        """The stream and durable from which it pulls."""
        return self.key

    @property
    def ack_wait(self) -> float:
        """Seconds after which a message is redelivered that was neither settled nor renewed."""
        return self._exchange.ack_wait(self)

    def stop(self, timeout: float = 5.0) -> None:
        """Stop, and wait up to ``timeout`` seconds for a delivery that is being handed over."""
        self._exchange.stop_pull(self, timeout)

    @property
    def is_healthy(self) -> bool:
        """Whether the pull runs and the broker is connected."""
        return not self.is_stopped and self._exchange.is_up


class MemoryListener(CoreSubscription):
    """A subscription to a core subject of the broker in memory."""

    def __init__(
        self, exchange: Exchange, subject: str, callback: Callable[[Message], None]
    ) -> None:
        self.subject = subject
        self.callback = callback
        self._exchange = exchange

    def stop(self) -> None:
        """End the subscription."""
        self._exchange.stop_listener(self)


class Exchange:
    """Streams, the pulls on their consumers, and listeners, behind one lock.

    Private methods, and methods with "lock held", must be called with the lock held. Callbacks
    run without it.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.lock = threading.Lock()
        self.is_up = True
        self.streams: dict[str, MemoryStream] = {}
        #: The number of acks that are still to be lost, for tests.
        self.acks_to_drop = 0
        self._pulls: dict[tuple[str, str], deque[MemoryConsumption]] = {}
        self._listeners: list[MemoryListener] = []
        self._hand_over = HandOver(self.lock)
        self._alarm = (
            None if isinstance(clock, VirtualClock) else Alarm(self.lock, clock.now, self.deliver)
        )

    # --- connection

    def require_connection(self) -> None:
        """Raise ``NotConnected`` if disconnected."""
        if not self.is_up:
            raise not_connected()

    def cut_off(self) -> threading.Thread | None:
        """Stop all deliveries (lock held); queued deliveries stay requested.

        :returns: the timer thread, if there was one; it ends by itself.
        """
        self.is_up = False
        for pulls in self._pulls.values():
            for pull in pulls:
                pull.credits += len(self._hand_over.withdraw(pull))
        return self._alarm.cancel() if self._alarm else None

    # --- messages in

    def store(self, message: Message) -> StoredAck | PublishError:
        """Pass a message to listeners and its stream (lock held; call ``deliver`` afterwards)."""
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
        """Deliver all messages that can be delivered now."""
        with self.lock:
            for key in self._pulls:
                self._feed(key)
        self._hand_over.run()

    def _feed(self, key: tuple[str, str]) -> None:
        """Queue messages for a consumer's pulls in turn, and set the alarm for later ones."""
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
        """Deliver a message to a pull that subscribes to it, or redeliver it later.

        If several versions of an application share the consumer, some pulls do not subscribe to
        it. A message to which no pull subscribes is acked.
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
        """Take one message to deliver (lock held); None if there is none."""
        taken = consumer.take(self.clock.now()) if self.is_up else None
        return MemoryDelivery(self, consumer.config.durable, *taken) if taken else None

    # --- settling

    def settle(
        self,
        delivery: MemoryDelivery,
        change: Callable[[MemoryConsumer, float], None],
        *,
        is_ack: bool = False,
    ) -> None:
        """Apply ``change`` to the consumer of ``delivery``, unless it is already settled."""
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
        """Restart the ``ack_wait`` of ``delivery``."""
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
        """Return the config with the consumer's actual stream and name (lock held)."""
        own = self.streams.get(config.stream)
        if not config.elsewhere or (own is not None and own.stores_one_of(config.filter_subjects)):
            return config
        for name, stream in self.streams.items():
            if stream.stores_one_of(config.filter_subjects):
                return msgspec.structs.replace(config, stream=name, durable=config.elsewhere)
        return config

    def ack_wait(self, pull: MemoryConsumption) -> float:
        """Return the ``ack_wait`` of the consumer of ``pull``, in seconds."""
        with self.lock:
            consumer = self.consumer(*pull.key)
            return consumer.config.ack_wait if consumer else pull.config.ack_wait

    def add_consumer(self, config: ConsumerConfig) -> MemoryConsumer:
        """Create or update a consumer (lock held).

        It keeps what other versions of the application need that pull on it.

        :raises TopologyError: its stream is missing.
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
        """Delete a consumer (lock held), or recreate it at its position if it has pulls."""
        found = self.streams.get(stream)
        removed = found.consumers.pop(durable, None) if found else None
        if removed is None:
            return False
        pulls = self._pulls.get((stream, durable))
        if pulls:
            self.add_consumer(pulls[0].config).start_after(removed.floor)
        return True

    def waiting(self, stream: str, durable: str) -> int:
        """Return the number of pulls of a consumer that wait for messages (lock held)."""
        return sum(1 for pull in self._pulls.get((stream, durable), ()) if pull.credits)

    def add_pull(self, pull: MemoryConsumption) -> None:
        """Create or update the consumer of ``pull``, and add the pull to it."""
        with self.lock:
            self.add_consumer(pull.config)
            self._pulls.setdefault(pull.key, deque()).append(pull)

    def request(self, pull: MemoryConsumption, count: int) -> None:
        """Request ``count`` more messages for ``pull``."""
        with self.lock:
            if not pull.is_stopped:
                pull.credits += count
                self._feed(pull.key)
        self._hand_over.run()

    def stop_pull(self, pull: MemoryConsumption, timeout: float) -> None:
        """Stop ``pull``, and pass its queued deliveries to other pulls."""
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
        """Pass later messages to its subject to ``listener``."""
        with self.lock:
            self._listeners.append(listener)

    def stop_listener(self, listener: MemoryListener) -> None:
        """Pass no more messages to ``listener``."""
        with self.lock:
            if listener in self._listeners:
                self._listeners.remove(listener)
            self._hand_over.withdraw(listener)


def not_connected() -> NotConnected:
    """Return the error of a broker that is closed or disconnected."""
    return NotConnected(
        "The broker in memory is closed or was disconnected by a test.",
        "Call reconnect(), or do not use it after shutdown().",
    )
