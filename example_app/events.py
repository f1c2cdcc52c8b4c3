"""What the parts of the shop tell each other: the messages, by topic.

Event ids are made from the order, not at random: whoever announces the same fact again,
after a crash or a timeout, announces the same event.
"""

from __future__ import annotations

from dataclasses import dataclass

from flask_natspubsub import PublishReceipt

from .extensions import pubsub
from .models import Order, Reservation


@dataclass(frozen=True)
class OrderCreated:
    """Somebody wants ``quantity`` pieces of a product."""

    order_id: int
    product_id: int
    quantity: int


@dataclass(frozen=True)
class OrderSettled:
    """The stock was reserved (``order.confirmed``) or did not suffice (``order.rejected``)."""

    order_id: int


def order_created(order: Order) -> PublishReceipt:
    """Announce a new order."""
    return pubsub.publish(
        "order.created",
        OrderCreated(order_id=order.id, product_id=order.product_id, quantity=order.quantity),
        event_id=f"order-{order.id}-created",
        trace_id=order.trace_id,
    )


def order_settled(reservation: Reservation) -> PublishReceipt:
    """Announce what became of an order."""
    outcome = "confirmed" if reservation.accepted else "rejected"
    return pubsub.publish(
        f"order.{outcome}",
        OrderSettled(order_id=reservation.order_id),
        event_id=f"order-{reservation.order_id}-{outcome}",
    )
