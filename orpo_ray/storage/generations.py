"""Answers to held-out prompts, as a file of a trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orpo_ray.files import write_atomically

GENERATIONS_FILE = "generations.jsonl"
"""In a trial's directory: one row per evaluation and prompt, see `generate`."""


def keep(folder: Path, rows: list[dict[str, Any]], step: int) -> None:
    """Put an evaluation's rows behind the earlier ones; those of this step or later, from before a restart, go."""
    path = folder / GENERATIONS_FILE
    earlier = [row for row in read(folder) if row["step"] < step]
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in earlier + rows))


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows kept in a trial's directory, in order; none if there is no file."""
    path = folder / GENERATIONS_FILE
    if not path.is_file():
        return []
    # Of bytes: a text's lines would also end at U+2028 and its like, which JSON leaves as they are.
    return [json.loads(line) for line in path.read_bytes().splitlines()]
