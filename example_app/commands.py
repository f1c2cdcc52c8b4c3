"""The shop's own commands."""

from __future__ import annotations

import click
from flask import Flask
from flask.cli import with_appcontext
from sqlalchemy import select

from .extensions import db
from .models import Product


def init_app(app: Flask) -> None:
    """Add the commands to ``flask``."""
    app.cli.add_command(init_db)


@click.command("init-db")
@with_appcontext
def init_db() -> None:
    """Create the tables and some products, unless they exist."""
    db.create_all()
    if db.session.scalar(select(Product.id).limit(1)) is None:
        db.session.add_all(first_products())
        db.session.commit()
    click.echo("The shop has its tables.")


def first_products() -> list[Product]:
    """Return the products of a new shop; the last one has no warehouse."""
    return [
        Product(id=1, name="Teapot", price_cents=2450, stock=1000, warehouse="north"),
        Product(id=2, name="Cup", price_cents=690, stock=8, warehouse="north"),
        Product(id=3, name="Samovar", price_cents=18900, stock=3, warehouse=None),
    ]
