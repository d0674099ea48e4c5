"""Hostile inputs by kind, and what becomes of each: `python -m tests.support.hostile` writes their table."""
