"""Constants of the outbox's tables that modules without SQLAlchemy read too."""

from __future__ import annotations

PENDING, SENT, PARKED = "pending", "sent", "parked"
STATUSES = (PENDING, SENT, PARKED)

#: The databases that the tables can be created in.
DIALECTS = ("sqlite", "postgresql", "mysql", "mariadb")

#: A partition's lease is called this and the partition's number.
PARTITION = "outbox/"
