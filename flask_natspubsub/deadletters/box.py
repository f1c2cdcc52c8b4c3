"""Storing dead letters.

A dead letter is the original message, byte for byte, with headers that say why and where
from; see the wire format. It is stored before the original is terminated, so the message is in at
least one of the two places whatever dies in between.
"""

from __future__ import annotations

from ..brokers.base import Broker, Delivery
from ..brokers.storing import MESSAGE_ID, store_one
from ..config.settings import Settings
from ..errors import PayloadTooLarge
from ..messages.identity import place_key
from ..messages.ids import now_timestamp
from ..messages.message import Message, StoredMessage
from ..messages.subjects import dead_letter_subject
from ..subscribing.reading import try_read
from ..subscribing.retry import GiveUpReason, error_text
from ..subscribing.subscription import Subscription
from ..subscribing.tracebacks import frames_of
from .replays import kept
from .shapes import BODY_OMITTED

#: The token behind a subscriber's dead letters under which its trials are noted.
TRIAL = "trial"


class DeadLetterBox:
    """Stores the messages that a worker of one application gives up on."""

    def __init__(self, broker: Broker, settings: Settings) -> None:
        self._broker = broker
        self._settings = settings

    def store(
        self,
        delivery: Delivery,
        subscription: Subscription,
        reason: GiveUpReason,
        error: BaseException,
    ) -> None:
        """Store a dead letter. Idempotent: its id names the app, the subscriber and the message.

        A body that is too large together with the added headers is left out: it stays in the
        original stream, where ``DeadLetters`` finds it.

        :raises PublishError: it could not be stored.
        """
        own = self._headers(delivery, subscription, reason, error)
        subject = self._subject(subscription)
        message = Message(subject, delivery.data, kept(delivery.headers) | own)
        try:
            store_one(self._broker, message, self._settings.publish_timeout)
        except PayloadTooLarge:
            message = Message(subject, b"", own | {BODY_OMITTED: "true"})
            store_one(self._broker, message, self._settings.publish_timeout)

    def _headers(
        self,
        delivery: Delivery,
        subscription: Subscription,
        reason: GiveUpReason,
        error: BaseException,
    ) -> dict[str, str]:
        place = place_key(delivery.stream, delivery.sequence, delivery.timestamp)
        received = try_read(subscription.read, delivery)
        ids = {
            "x-event-id": received.event_id if received else None,
            "x-trace-id": received.trace_id if received else None,
            "x-dlq-traceback": frames_of(error),
        }
        return {
            "x-dead-letter": "true",
            "x-dlq-reason": reason,
            "x-dlq-error": error_text(error),
            "x-deliveries": str(delivery.attempt),
            "x-original-subject": delivery.subject,
            "x-original-stream": delivery.stream,
            "x-original-sequence": str(delivery.sequence),
            "x-subscriber": subscription.name,
            "x-dead-lettered-at": now_timestamp(),
            MESSAGE_ID: f"dlq:{subscription.key}:{place}",
        } | {name: value for name, value in ids.items() if value}

    def _subject(self, subscription: Subscription) -> str:
        settings = self._settings
        return dead_letter_subject(settings.env, settings.app_name, subscription.token)

    # A message over its delivery limit that no handler refused was being handled whenever the
    # process died: it is the culprit or a bystander. It is run once more, alone, after a marker
    # was stored beside the dead letters. If the next delivery finds the marker, the process did
    # not survive that run. The server's count cannot tell: it counts bystanders too.

    def trial_was_started(self, delivery: Delivery, subscription: Subscription) -> bool:
        """Whether a process died while it ran this message alone."""
        return self._trial_marker(delivery, subscription) is not None

    def start_trial(self, delivery: Delivery, subscription: Subscription) -> None:
        """Store the marker: this message is about to be run alone."""
        subject = self._trial_subject(delivery, subscription)
        store_one(self._broker, Message(subject, b"", {}), self._settings.publish_timeout)

    def end_trial(self, delivery: Delivery, subscription: Subscription) -> None:
        """Delete the marker: the message is settled."""
        marker = self._trial_marker(delivery, subscription)
        if marker is not None:
            self._broker.delete_message(marker.stream, marker.sequence)

    def _trial_subject(self, delivery: Delivery, subscription: Subscription) -> str:
        place = place_key(delivery.stream, delivery.sequence, delivery.timestamp)
        return f"{self._subject(subscription)}.{TRIAL}.{place.replace(':', '.')}"

    def _trial_marker(self, delivery: Delivery, subscription: Subscription) -> StoredMessage | None:
        subject = self._trial_subject(delivery, subscription)
        for stream in (self._settings.dead_letter_stream, self._settings.stream):
            found = self._broker.last_message(stream, subject)
            if found is not None:
                return found
        return None
