"""The files of a run directory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from orpo_ray.files import write_atomically

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
    text = json.dumps(finite(results), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(Path(path), text + "\n", durable=True)


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
