"""``doctor``: gather facts, check them, and say what to do."""
