"""Faults done to real sweeps from inside and outside their processes, and what was lost by them.

`inject/sitecustomize.py` acts inside worker processes, `disturbed` starts sweeps and reaches their processes from
outside, `damage` compares what a disturbed sweep left with what an undisturbed one left, `scenarios` is the list.
"""
