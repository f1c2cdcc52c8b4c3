"""The worker: consumers, handlers, and an orderly end."""
