"""The pieces of a page: tables, numbers, durations and counts as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping


def number(value: float | None, spec: str = ".4f") -> str:
    """A dash where there is no value."""
    return "–" if value is None or math.isnan(value) else f"{value:{spec}}"


def markdown_table(titles: list[str], rows: list[list[str]]) -> str:
    """Columns of numbers to the right, of anything else, and the first, to the left."""
    marks = ["---"] + ["---:" if all(map(_is_number, cells)) else "---" for cells in list(zip(*rows, strict=True))[1:]]
    body = [titles, marks if rows else ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body)


def _is_number(cell: str) -> bool:
    """Whether it begins as one, bold or not; a dash stands for a missing one."""
    return re.match(r"[*]*[+-]?[.\d]|[–-]?$", cell) is not None


def duration(seconds: float | None) -> str:
    """A measured time in seconds, minutes or hours with one decimal: `12.5 s`, `4.0 min`; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def short_count(count: float, units: tuple[str, str, str] = ("B", "M", "K")) -> str:
    """A number of parameters with three digits and a unit: 1.3e9 becomes `1.3B`."""
    for size, unit in zip((1e9, 1e6, 1e3), units, strict=True):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def status_text(status: str) -> str:
    """A trial's status as words: `stopped_early` becomes `stopped early`."""
    return status.replace("_", " ")


def ended_as(statuses: Mapping[str, int]) -> str:
    """How many trials have each status, in the order given: `12 finished, 1 diverged`; statuses of none left out."""
    return ", ".join(f"{count} {status_text(status)}" for status, count in statuses.items() if count)


def better_when(mode: str) -> str:
    """Which direction of a metric is better: `higher` for mode `max`, `lower` for `min`."""
    return "higher" if mode == "max" else "lower"
