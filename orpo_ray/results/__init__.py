"""Finished sweeps: loading, judging, comparing and exporting them."""
