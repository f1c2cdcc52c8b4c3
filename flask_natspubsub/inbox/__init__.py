"""The table of what has been handled: a handler's database effects happen once."""
