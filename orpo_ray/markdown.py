"""The pieces of a page: tables and numbers in Markdown."""

from __future__ import annotations

import math


def number(value: float | None, spec: str = ".4f") -> str:
    """A dash where there is no value."""
    return "–" if value is None or math.isnan(value) else f"{value:{spec}}"


def markdown_table(titles: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    body = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body)
