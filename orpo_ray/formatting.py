"""Numbers and Markdown tables as text."""

from __future__ import annotations

import math
import re


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


MIB, GIB = 2**20, 2**30


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
