"""Products, orders, stock movements and the audit trail."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import CheckConstraint, DateTime, ForeignKey, String
from sqlalchemy.orm import Mapped, foreign, mapped_column, relationship

from .extensions import Base

OrderState = Literal["pending", "confirmed", "rejected"]
MovementState = Literal["planned", "booked", "refused"]


def utc_now() -> datetime:
    """Return the current time as an aware datetime in UTC."""
    return datetime.now(UTC)


class Product(Base):
    """A product. Without a ``warehouse`` it cannot be delivered."""

    __tablename__ = "products"
    __table_args__ = (CheckConstraint("stock >= 0"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(80), unique=True)
    price_cents: Mapped[int]
    stock: Mapped[int]
    warehouse: Mapped[str | None] = mapped_column(String(40))

    def as_json(self) -> dict[str, Any]:
        """Return the product as the HTTP API shows it."""
        return {
            "id": self.id,
            "name": self.name,
            "price_cents": self.price_cents,
            "stock": self.stock,
            "warehouse": self.warehouse,
        }


class Order(Base):
    """An order. It is pending until the stock was checked."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey(Product.id))
    quantity: Mapped[int]
    state: Mapped[OrderState] = mapped_column(default="pending", index=True)
    idempotency_key: Mapped[str | None] = mapped_column(String(80), unique=True)
    trace_id: Mapped[str | None] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=utc_now)

    product: Mapped[Product] = relationship(lazy="joined", innerjoin=True)
    history: Mapped[list[AuditEntry]] = relationship(
        primaryjoin=lambda: Order.id == foreign(AuditEntry.order_id),
        order_by=lambda: AuditEntry.sequence,
        viewonly=True,
    )

    def as_json(self) -> dict[str, Any]:
        """Return the order as the HTTP API shows it."""
        return {
            "id": self.id,
            "product": {"id": self.product_id, "name": self.product.name},
            "quantity": self.quantity,
            "state": self.state,
            "trace_id": self.trace_id,
        }


class StockMovement(Base):
    """The stock that an order needs: planned with the order, then booked or refused."""

    __tablename__ = "stock_movements"

    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id), primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey(Product.id))
    quantity: Mapped[int]
    state: Mapped[MovementState] = mapped_column(default="planned")

    def settle(self, product: Product) -> None:
        """Take the quantity out of the stock, or refuse if the stock is too low."""
        if product.stock < self.quantity:
            self.state = "refused"
        else:
            product.stock -= self.quantity
            self.state = "booked"


class AuditEntry(Base):
    """One event about an order."""

    __tablename__ = "audit_entries"

    id: Mapped[int] = mapped_column(primary_key=True)
    event_id: Mapped[str] = mapped_column(String(255))
    order_id: Mapped[int] = mapped_column(index=True)
    topic: Mapped[str] = mapped_column(String(80))
    trace_id: Mapped[str | None] = mapped_column(String(128))
    sequence: Mapped[int]
    handled_by: Mapped[str] = mapped_column(String(40))
    recorded_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=utc_now)

    def as_json(self) -> dict[str, Any]:
        """Return the entry as the HTTP API shows it."""
        return {
            "topic": self.topic,
            "event_id": self.event_id,
            "trace_id": self.trace_id,
            "sequence": self.sequence,
            "handled_by": self.handled_by,
        }
