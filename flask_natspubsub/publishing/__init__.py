"""From a view to the broker or the outbox."""
