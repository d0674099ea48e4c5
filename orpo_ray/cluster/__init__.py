"""Reach a Ray cluster: submit jobs and check nodes."""
