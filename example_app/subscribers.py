"""The shop's subscribers, which run in ``flask natspubsub worker``.

No handler commits: the worker commits the handler's changes, the events that it published and its
inbox row in one transaction. A message that is delivered twice therefore changes nothing.
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
    """Reserve the ordered quantity, or reject the order."""
    # SQLite has no row locks; there the inbox row is written first and blocks other handlers.
    product = db.session.get_one(Product, message.product_id, with_for_update=True)
    if product.warehouse is None:
        raise ValueError(f"nobody knows which warehouse has {product.name!r}")
    movement = db.session.get_one(StockMovement, message.order_id)
    movement.settle(product)
    movement_changed.send(movement)
    order_settled(movement)


@pubsub.subscriber(["order.confirmed", "order.rejected"])
def confirm_order(message: OrderSettled, context: MessageContext) -> None:
    """Set the state of the order."""
    db.session.execute(
        update(Order)
        .where(Order.id == message.order_id, Order.state == "pending")
        .values(state=context.topic.removeprefix("order."))
    )


@dataclass(frozen=True)
class ProductUpdated:
    """The fields of ``product.updated`` that this module needs."""

    name: str
    stock: int
    changed: list[str]


@pubsub.subscriber("product.updated", inbox=False)  # a log line may repeat
def warn_of_low_stock(message: ProductUpdated) -> None:
    """Log a warning if the stock is low."""
    if "stock" in message.changed and message.stock <= LOW_STOCK:
        current_app.logger.warning("only %s left: %s", message.stock, message.name)


class Audit(Subscriber):
    """Keeps an audit trail of all events about orders."""

    topics = "order.>"

    def handle(self, message: dict[str, Any], context: MessageContext) -> None:
        """Add an entry for the event."""
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
