"""Reaching a Ray cluster: submitting jobs and checking nodes."""
