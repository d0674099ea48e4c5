"""Claim a run directory for a sweep, or check that it holds the same sweep already."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

from orpo_ray.config import ExperimentConfig
from orpo_ray.files import read_json
from orpo_ray.orchestration.checks import SweepError
from orpo_ray.storage import sync
from orpo_ray.storage.object_store import Storage
from orpo_ray.storage.run_dir import FITTED_FILE, LOCK_FILE, RESULTS_FILE, SWEEP_FILE, write_results


def claim_run_dir(config: ExperimentConfig, remote: Storage | None) -> str:
    """Write the config into a new run directory, or compare it with the one there. Returns the sweep's id.

    Raises:
        SweepError: the directory holds a sweep with other settings.
    """
    path = config.run_dir / SWEEP_FILE
    mine = config.model_dump(mode="json")
    if path.exists():
        known = read_json(path)
        changed = sorted(_differences(_comparable(known["config"]), _comparable(mine)))
        if changed:
            raise SweepError(
                f"{config.run_dir} holds a sweep with other settings ({'; '.join(changed)}): "
                "choose another name, or remove that directory to start over"
            )
        (config.run_dir / RESULTS_FILE).unlink(missing_ok=True)  # results of an earlier end are outdated
        return str(known["sweep_id"])
    sweep_id = uuid.uuid4().hex[:12]
    write_results(path, {"sweep_id": sweep_id, "created": int(time.time() * 1000), "config": mine})
    if remote is not None:
        sync.put(config.run_dir, remote, SWEEP_FILE)
    return sweep_id


def _comparable(tree: dict[str, Any]) -> dict[str, Any]:
    """A config without the settings that may change when a sweep is continued: where it runs, not what it does."""
    tree = json.loads(json.dumps(tree))
    tree.setdefault("storage", None)  # missing in sweeps of older versions
    tree.pop("checkpoint", None)
    for name in ("num_workers", "cpus_per_worker"):
        tree["scaling"].pop(name, None)  # checkpoints are resharded, and the objective does not depend on it
    tree.pop("output_dir")
    tree["tracking"].pop("system_metrics", None)
    tree.pop("generation", None)  # only displayed; missing in sweeps of older versions
    for name in ("max_concurrent", "max_failures"):
        tree["sweep"].pop(name)
    return tree


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old.keys() | new.keys()
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [f"{path} was {old}, is {new}"]


def remove_new_run_dir(run_dir: Path) -> None:
    """Remove the files of a sweep that was refused at its start; other files stay."""
    for name in (SWEEP_FILE, FITTED_FILE, LOCK_FILE):
        (run_dir / name).unlink(missing_ok=True)
    if not any(run_dir.iterdir()):
        run_dir.rmdir()
