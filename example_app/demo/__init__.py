"""The demonstration: the whole shop on free ports, and the way of some orders through it.

``python -m example_app.demo`` stays up until Ctrl-C; with ``--once`` it ends by itself.
"""
