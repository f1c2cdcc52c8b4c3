"""What the outbox and the inbox promise, while processes, servers and connections are killed.

``python -m tests.torture --help``. Every scenario counts what was committed and what came of
it; ``test_short.py`` runs the small sizes.
"""
