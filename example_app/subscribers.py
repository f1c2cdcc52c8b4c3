"""What happens after an order was accepted; runs in ``flask natspubsub worker``.

Every message arrives at least once, so each handler is written to do no harm when called
again: it looks for what it has already done.
"""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import update
from sqlalchemy.exc import IntegrityError

from flask_natspubsub import MessageContext, Subscriber

from .events import OrderCreated, OrderSettled, order_settled
from .extensions import db, pubsub
from .models import AuditEntry, Order, Product, Reservation


@pubsub.subscriber("order.created")
def reserve_stock(message: OrderCreated) -> None:
    """Take the ordered quantity from the stock, or refuse, and say which."""
    reservation = db.session.get(Reservation, message.order_id) or decide(message)
    order_settled(reservation)


def decide(message: OrderCreated) -> Reservation:
    """Decide on an order; the stock and the decision change together or not at all.

    Should two workers decide on one order at once, the second fails on the primary key,
    takes its change of the stock back and finds the decision when it tries again.
    """
    product = db.session.get_one(Product, message.product_id)
    if product.warehouse is None:
        raise ValueError(f"nobody knows which warehouse has {product.name!r}")
    taken = db.session.connection().execute(
        update(Product)
        .where(Product.id == product.id, Product.stock >= message.quantity)
        .values(stock=Product.stock - message.quantity)
    )
    reservation = Reservation(order_id=message.order_id, accepted=taken.rowcount == 1)
    db.session.add(reservation)
    db.session.commit()
    return reservation


@pubsub.subscriber(["order.confirmed", "order.rejected"])
def confirm_order(message: OrderSettled, context: MessageContext) -> None:
    """Show the customer what became of the order."""
    db.session.execute(
        update(Order)
        .where(Order.id == message.order_id, Order.state == "pending")
        .values(state=context.topic.removeprefix("order."))
    )
    db.session.commit()


class Audit(Subscriber):
    """Keeps a trail of everything that happens to orders."""

    topics = "order.>"

    def handle(self, message: dict[str, Any], context: MessageContext) -> None:
        """Write the event down, once."""
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
        try:
            db.session.commit()
        except IntegrityError:  # it is in the trail already
            db.session.rollback()
