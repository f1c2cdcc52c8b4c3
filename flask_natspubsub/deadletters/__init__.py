"""Messages that were given up on: kept, read, sent again, discarded."""
