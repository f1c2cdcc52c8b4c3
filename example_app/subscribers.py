"""What happens after an order was accepted; runs in ``flask natspubsub worker``.

No handler commits: the worker commits what a handler did, what it published, and that it
handled this event, in one transaction. So a message that comes twice changes nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from flask import current_app
from sqlalchemy import update

from flask_natspubsub import MessageContext, Subscriber

from .events import OrderCreated, OrderSettled, movement_changed, order_settled
from .extensions import db, pubsub
from .models import AuditEntry, Order, Product, StockMovement

LOW_STOCK = 5


@pubsub.subscriber("order.created")
def reserve_stock(message: OrderCreated) -> None:
    """Take the ordered quantity from the stock, or refuse, and say which."""
    # SQLite has no row locks; there the inbox row, written first, lets one handler in at a time.
    product = db.session.get_one(Product, message.product_id, with_for_update=True)
    if product.warehouse is None:
        raise ValueError(f"nobody knows which warehouse has {product.name!r}")
    movement = db.session.get_one(StockMovement, message.order_id)
    movement.settle(product)
    movement_changed.send(movement)
    order_settled(movement)


@pubsub.subscriber(["order.confirmed", "order.rejected"])
def confirm_order(message: OrderSettled, context: MessageContext) -> None:
    """Show the customer what became of the order."""
    db.session.execute(
        update(Order)
        .where(Order.id == message.order_id, Order.state == "pending")
        .values(state=context.topic.removeprefix("order."))
    )


@dataclass(frozen=True)
class ProductUpdated:
    """What this module needs of ``product.updated``."""

    name: str
    stock: int
    changed: list[str]


@pubsub.subscriber("product.updated", inbox=False)  # a line in the log may come twice
def warn_of_low_stock(message: ProductUpdated) -> None:
    """Tell whoever reads the log that it is time to buy."""
    if "stock" in message.changed and message.stock <= LOW_STOCK:
        current_app.logger.warning("only %s left: %s", message.stock, message.name)


class Audit(Subscriber):
    """Keeps a trail of everything that happens to orders."""

    topics = "order.>"

    def handle(self, message: dict[str, Any], context: MessageContext) -> None:
        """Write the event down."""
        db.session.add(
            AuditEntry(
                event_id=context.event_id,
                order_id=message["order_id"],
                topic=context.topic,
                trace_id=context.trace_id,
                sequence=context.sequence,
                handled_by=f"process {os.getpid()}",
            )
        )
