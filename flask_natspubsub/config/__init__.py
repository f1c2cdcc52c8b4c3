"""Settings: their table in groups, and the parsers that check them."""
