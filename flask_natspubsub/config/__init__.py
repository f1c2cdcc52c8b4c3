"""What a project can set: the settings, and the parsers that check them."""
