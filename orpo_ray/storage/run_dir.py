"""The files of a run directory."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"
RESULTS_FILE = "results.json"
SWEEP_FILE = "sweep.json"
"""Id and config of the sweep, written before its first event."""
FITTED_FILE = "fitted.json"
"""What `scaling: auto` became: bundle label ("" where there is none) -> settings. A continued sweep keeps them, on
whatever cluster: a checkpoint fits the workers it was written by."""
LOCK_FILE = "sweep.lock"
"""Held (flock) by the process that runs the sweep."""


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Write results.json, or what else is kept as JSON, whole or not at all: a reader never sees half a file.

    NaN and infinity become null.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(finite(results), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case _:
            return value
