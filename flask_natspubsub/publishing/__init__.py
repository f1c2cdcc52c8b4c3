"""Publishing: from the call of ``publish`` to the broker or the outbox."""
