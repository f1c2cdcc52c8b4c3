"""From a view to the broker."""
