"""Seeing what goes on: traces, health."""
