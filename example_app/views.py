"""The HTTP API and the home page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from flask import Blueprint, render_template, request
from flask.typing import ResponseReturnValue
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import selectinload
from werkzeug.exceptions import Conflict

from flask_natspubsub import current_trace_id

from . import events
from .errors import InvalidInput
from .extensions import db
from .models import Order, OrderState, Product, StockMovement

shop = Blueprint("shop", __name__)

MAX_QUANTITY = 10_000
PAGE_SIZE = 50


@shop.get("/")
def home() -> str:
    """Show products and the latest orders with their audit trail."""
    products = db.session.scalars(select(Product).order_by(Product.id))
    newest = select(Order).order_by(Order.id.desc()).limit(PAGE_SIZE)
    orders = db.session.scalars(newest.options(selectinload(Order.history)))
    return render_template("shop.html", products=products.all(), orders=orders.all())


@shop.get("/products")
def list_products() -> ResponseReturnValue:
    """List the products."""
    products = db.session.scalars(select(Product).order_by(Product.id))
    return [product.as_json() for product in products]


@shop.patch("/products/<int:product_id>")
def change_product(product_id: int) -> ResponseReturnValue:
    """Change the stock or the warehouse of a product."""
    product = db.get_or_404(Product, product_id)
    changes = read_fields({"stock": a_stock, "warehouse": a_name}, required=False)
    for name, value in changes.items():
        setattr(product, name, value)
    db.session.commit()
    return product.as_json()


@shop.post("/orders")
def create_order() -> ResponseReturnValue:
    """Accept an order (202), which is confirmed or rejected later.

    A client that sends an ``Idempotency-Key`` can repeat the request until it gets an answer;
    only one order is created.
    """
    wanted = read_fields({"product_id": an_id, "quantity": a_quantity})
    order = repeated_order(wanted) or new_order(wanted)
    return order.as_json(), 202, {"Location": f"/orders/{order.id}"}


@shop.get("/orders")
def list_orders() -> ResponseReturnValue:
    """List the newest orders, all or those in one ``state``."""
    query = select(Order).order_by(Order.id.desc()).limit(PAGE_SIZE)
    if state := request.args.get("state"):
        if state not in get_args(OrderState):
            raise InvalidInput({"state": f"must be one of {', '.join(get_args(OrderState))}"})
        query = query.where(Order.state == state)
    return [order.as_json() for order in db.session.scalars(query)]


@shop.get("/orders/<int:order_id>")
def show_order(order_id: int) -> ResponseReturnValue:
    """Show an order with its audit trail."""
    order = db.get_or_404(Order, order_id)
    return order.as_json() | {"history": [entry.as_json() for entry in order.history]}


# --- orders ------------------------------------------------------------------------------


def new_order(wanted: dict[str, int]) -> Order:
    """Save a new order and its events in one transaction."""
    if db.session.get(Product, wanted["product_id"]) is None:
        raise InvalidInput({"product_id": "there is no such product"})
    order = Order(**wanted, idempotency_key=idempotency_key(), trace_id=current_trace_id())
    db.session.add(order)
    try:
        db.session.flush()  # gives the order its id
        movement = StockMovement(order_id=order.id, **wanted, state="planned")
        db.session.add(movement)
        events.movement_changed.send(movement)
        events.order_created(order)
        db.session.commit()
    except IntegrityError as error:
        raise Conflict("The same request is being served right now; send it again.") from error
    return order


def repeated_order(wanted: dict[str, int]) -> Order | None:
    """Return the order that an earlier copy of this request created, if any."""
    if (key := idempotency_key()) is None:
        return None
    order = db.session.scalar(select(Order).where(Order.idempotency_key == key))
    if order and (order.product_id, order.quantity) != tuple(wanted.values()):
        raise Conflict("This Idempotency-Key belongs to another order.")
    return order


def idempotency_key() -> str | None:
    """Return the client's ``Idempotency-Key``."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not 0 < len(key) <= 80:
        raise InvalidInput({"Idempotency-Key": "must have 1 to 80 characters"})
    return key


# --- validation of requests --------------------------------------------------------------


def read_fields(
    checks: dict[str, Callable[[Any], Any]], *, required: bool = True
) -> dict[str, Any]:
    """Return the checked fields of the JSON body.

    :raises InvalidInput: a field is missing, invalid or unknown; names all of them.
    """
    body = request.get_json(silent=True)
    if not isinstance(body, dict):
        raise InvalidInput({"body": "must be a JSON object, sent as application/json"})
    values: dict[str, Any] = {}
    problems = dict.fromkeys(body.keys() - checks.keys(), "is not a known field")
    for name, check in checks.items():
        if name not in body:
            if required:
                problems[name] = "is missing"
            continue
        try:
            values[name] = check(body[name])
        except ValueError as error:
            problems[name] = str(error)
    if problems:
        raise InvalidInput(problems)
    return values


def whole_number(value: Any, low: int, high: int) -> int:
    """Check that ``value`` is a whole number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"must be a whole number from {low} to {high}")
    return value


def an_id(value: Any) -> int:
    """Check a product id."""
    return whole_number(value, 1, 2**31 - 1)


def a_quantity(value: Any) -> int:
    """Check an ordered quantity."""
    return whole_number(value, 1, MAX_QUANTITY)


def a_stock(value: Any) -> int:
    """Check a stock."""
    return whole_number(value, 0, 10**6)


def a_name(value: Any) -> str:
    """Check a name."""
    if not isinstance(value, str) or not 0 < len(value.strip()) <= 40:
        raise ValueError("must be a text of 1 to 40 characters")
    return value.strip()
