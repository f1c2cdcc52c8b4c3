"""The outbox: events are written in the caller's transaction and sent by the relay."""
