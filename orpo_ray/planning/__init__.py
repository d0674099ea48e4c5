"""Predict what a sweep will need: memory, time, cost, and whether it fits."""
