"""Presentation of results: the HTML report, terminal views and comparison pages."""
