"""The demonstration: runs the shop on free ports and follows some orders through it.

``python -m example_app.demo`` runs until Ctrl-C; with ``--once`` it exits by itself.
"""
