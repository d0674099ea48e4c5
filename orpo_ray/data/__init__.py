"""Preference pairs: from files and hubs to token ids. Needs no torch."""
