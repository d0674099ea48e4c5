"""Fuzzing of what reads files that others wrote."""
