"""From the broker to a handler: declarations, middleware, retries."""
