"""What the parts of the shop tell each other, and the rest of the company: messages, by topic.

All of them go through the outbox: a row in the transaction that makes them true.
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
    """Somebody wants ``quantity`` pieces of a product."""

    order_id: int
    product_id: int
    quantity: int


@dataclass(frozen=True)
class OrderSettled:
    """The stock was reserved (``order.confirmed``) or did not suffice (``order.rejected``)."""

    order_id: int


@dataclass(frozen=True)
class MovementChanged:
    """What an order takes out of the stock, and how far that is."""

    order_id: int
    product_id: int
    quantity: int
    state: MovementState


def order_created(order: Order) -> None:
    """Announce a new order."""
    message = OrderCreated(order.id, order.product_id, order.quantity)
    pubsub.publish("order.created", message)


def order_settled(movement: StockMovement) -> None:
    """Announce what became of an order."""
    outcome = "confirmed" if movement.state == "booked" else "rejected"
    pubsub.publish(f"order.{outcome}", OrderSettled(movement.order_id))


@pubsub.forward(movement_changed, "stock.movement")
def stock_movement(movement: StockMovement) -> MovementChanged:
    """Tell the warehouse, which has software of its own, in the transaction of the change."""
    return MovementChanged(
        movement.order_id, movement.product_id, movement.quantity, movement.state
    )


# product.created, product.updated and product.deleted, whoever changes a product.
pubsub.publish_changes(Product, "product", fields=("id", "name", "price_cents", "stock"))
