"""Words in the outbox's tables that other rooms read: statuses, and the names of leases.

Apart from the tables, so that reading them does not need SQLAlchemy.
"""

from __future__ import annotations

PENDING, SENT, PARKED = "pending", "sent", "parked"
STATUSES = (PENDING, SENT, PARKED)

#: A partition's lease is called this and the partition's number.
PARTITION = "outbox/"
