"""Numbers, durations, byte counts and Markdown tables as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

MIB, GIB = 2**20, 2**30


def number(value: float | None, spec: str = ".4f") -> str:
    """A number in the given format; a dash for None or NaN."""
    return "–" if value is None or math.isnan(value) else f"{value:{spec}}"


def markdown_table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns of numbers are aligned right, others and the first one left."""
    marks = ["---"] + ["---:" if all(map(_is_number, cells)) else "---" for cells in list(zip(*rows, strict=True))[1:]]
    body = [titles, marks if rows else ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body)


def _is_number(cell: str) -> bool:
    """Whether a cell starts like a number, bold or not; a dash stands for a missing number."""
    return re.match(r"[*]*[+-]?[.\d]|[–-]?$", cell) is not None


def clock(seconds: float) -> str:
    """Elapsed time as `m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def gib(count: int) -> str:
    """Bytes in GiB with one decimal."""
    return f"{count / GIB:.1f} GiB"


def mib(count: int) -> str:
    """Bytes in MiB with one decimal."""
    return f"{count / MIB:.1f} MiB"


def byte_size(count: int) -> str:
    """Bytes in GiB, or in whole MiB below 1 GiB."""
    return gib(count) if count >= GIB else f"{count / MIB:.0f} MiB"


def rough_duration(hours: float) -> str:
    """Hours as whole minutes (at least 1), hours or days, whichever fits an estimate."""
    if hours < 1:
        return f"{max(1, round(60 * hours))} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


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
