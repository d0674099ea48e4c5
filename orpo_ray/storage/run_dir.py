"""Names of the files in a run directory, and atomic JSON writes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_ray.storage.object_store import Storage

from orpo_ray.files import write_atomically

EVENTS_FILE = "events.jsonl"
RESULTS_FILE = "results.json"
SWEEP_FILE = "sweep.json"
"""Id and config of the sweep, written before its first event."""
FITTED_FILE = "fitted.json"
"""Settings chosen for `scaling: auto`: bundle label ("" without a bundle axis) -> settings. A continued sweep keeps
them on any cluster, because a checkpoint fits the number of workers that wrote it."""
LOCK_FILE = "sweep.lock"
"""Locked (flock) by the process that runs the sweep."""


@dataclass(frozen=True, slots=True)
class SweepFolder:
    """Where a sweep keeps its files."""

    run_dir: Path
    remote: Storage | None = None
    """The sweep's folder in an object store, if checkpoints and the journal are kept there."""

    @property
    def proof(self) -> Path | None:
        """A file that every node must see before it trains; None where nodes need not share files."""
        return None if self.remote else self.run_dir / SWEEP_FILE

    @property
    def trials_dir(self) -> Path | None:
        """Folder of the trials on storage that all nodes share; None where the object store keeps them."""
        return None if self.remote else self.run_dir / "trials"


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Write results.json or another JSON file atomically: a reader never sees half a file.

    NaN and infinity become null.
    """
    text = json.dumps(finite(results), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(Path(path), text + "\n", durable=True)


def finite(value: Any) -> Any:
    """The value with NaN and infinity replaced by None, at any depth."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case _:
            return value
