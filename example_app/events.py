"""The messages that the shop publishes, for its own subscribers and for other applications.

All of them go through the outbox: each is a row in the transaction that it announces.
"""

from __future__ import annotations

from dataclasses import dataclass

from blinker import signal

from .extensions import pubsub
from .models import MovementState, Order, Product, StockMovement

#: Sent whenever a stock movement was planned, booked or refused; the sender is the movement.
movement_changed = signal("stock-movement-changed")


@dataclass(frozen=True)
class OrderCreated:
    """A customer has ordered a product."""

    order_id: int
    product_id: int
    quantity: int


@dataclass(frozen=True)
class OrderSettled:
    """The stock was reserved (``order.confirmed``) or was too low (``order.rejected``)."""

    order_id: int


@dataclass(frozen=True)
class MovementChanged:
    """A stock movement of an order, and its state."""

    order_id: int
    product_id: int
    quantity: int
    state: MovementState


def order_created(order: Order) -> None:
    """Announce a new order."""
    message = OrderCreated(order.id, order.product_id, order.quantity)
    pubsub.publish("order.created", message)


def order_settled(movement: StockMovement) -> None:
    """Announce that an order was confirmed or rejected."""
    outcome = "confirmed" if movement.state == "booked" else "rejected"
    pubsub.publish(f"order.{outcome}", OrderSettled(movement.order_id))


@pubsub.forward(movement_changed, "stock.movement")
def stock_movement(movement: StockMovement) -> MovementChanged:
    """Inform the warehouse's own software, in the transaction of the change."""
    return MovementChanged(
        movement.order_id, movement.product_id, movement.quantity, movement.state
    )


# Publishes product.created, product.updated and product.deleted for every change of a product.
pubsub.publish_changes(Product, "product", fields=("id", "name", "price_cents", "stock"))
