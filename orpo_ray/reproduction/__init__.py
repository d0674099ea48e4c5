"""Reproduce the experiments of the ORPO paper, from training to the page that compares the numbers."""
