"""Generated answers to held-out prompts, kept in a file per trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orpo_ray.files import write_atomically

GENERATIONS_FILE = "generations.jsonl"
"""File in a trial's directory with one row per evaluation and prompt; see `training.generate`."""


def keep(folder: Path, rows: list[dict[str, Any]], step: int) -> None:
    """Append an evaluation's rows; rows of this step or later, written before a restart, are removed."""
    path = folder / GENERATIONS_FILE
    earlier = [row for row in read(folder) if row["step"] < step]
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in earlier + rows))


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows in a trial's directory, in order; an empty list if there is no file."""
    path = folder / GENERATIONS_FILE
    if not path.is_file():
        return []
    # Split bytes, not text: text lines also end at U+2028 and similar characters, which JSON does not escape.
    return [json.loads(line) for line in path.read_bytes().splitlines()]
