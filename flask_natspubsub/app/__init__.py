"""What belongs to one application, and how its parts are put together."""
