"""Choose the trial to export, and read what its run directory records about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_ray.config import ExperimentConfig, as_given, parse
from orpo_ray.config.space import describe
from orpo_ray.errors import UserError
from orpo_ray.files import read_json
from orpo_ray.formatting import status_text
from orpo_ray.models.precision import matmul_dtype, precision_name
from orpo_ray.storage import checkpoint_files
from orpo_ray.storage.find import find_run_dir
from orpo_ray.storage.object_store import Storage
from orpo_ray.storage.results import current
from orpo_ray.storage.run_dir import SWEEP_FILE
from orpo_ray.storage.sweep_state import read_state
from orpo_ray.tracking.read_runs import sweep_of_run
from orpo_ray.tracking.uri import TrackingError, resolve_uri


class ExportError(UserError, RuntimeError):
    """A model cannot be exported or registered; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trial with a checkpoint."""

    run_dir: Path
    sweep_id: str
    results: dict[str, Any]
    """results.json of its sweep; for a running sweep, the results so far."""
    trial: dict[str, Any]
    """The trial's entry in `results`."""
    config: ExperimentConfig
    """The trial's config."""
    checkpoint: Path
    manifest: dict[str, Any]
    """The checkpoint's manifest (`checkpoint_files.read_manifest`)."""
    logged: dict[str, float | None]
    """Held-out metrics that the run logged at the checkpoint's step; empty where it was not evaluated there."""
    products: str
    """Precision of the training's matrix products: `fp32` or `bf16`."""

    @property
    def step(self) -> int:
        """Optimizer steps done at the checkpoint."""
        return int(self.manifest["step"])


def find(run: str, tracking_uri: str | None = None) -> Candidate:
    """Find a trial and its newest complete checkpoint or, with `checkpoint.keep_best`, its best one.

    Args:
        run: a run directory, a sweep's name or its URI in an object store (its best trial), a trial's directory
            (`runs/NAME/trials/ID`), or an MLflow run id: of a child run (that trial) or of a parent (its best trial).
        tracking_uri: MLflow tracking URI to look up that run; by default MLFLOW_TRACKING_URI, else `runs/mlflow.db`.

    Raises:
        FileNotFoundError: there is no such sweep.
        ExportError: there is no such trial or MLflow run, or no checkpoint.
        TrackingError: the tracking URI is a relative path.
    """
    path = Path(run).expanduser().absolute()
    if path.parent.name == "trials" and path.is_dir():
        return _candidate(path.parent.parent, path.name)
    if re.fullmatch("[0-9a-f]{32}", run) and not path.exists():
        return _candidate(*_of_mlflow_run(run, resolve_uri(tracking_uri, Path("runs").absolute())))
    return _candidate(find_run_dir(run).absolute(), None)


def _of_mlflow_run(run_id: str, uri: str) -> tuple[Path, str | None]:
    """Run directory and trial id (None for a parent run) of an MLflow run."""
    try:
        sweep_id, trial_id, config = sweep_of_run(run_id, uri)
    except TrackingError as error:
        raise ExportError(f"{error}, or give another run id") from error
    if sweep_id is None:
        raise ExportError(f"MLflow run {run_id} was not made by orpo-ray; give a run directory, or another run id")
    run_dir = Path(config["output_dir"]).expanduser().absolute() / config["name"]
    if not (run_dir / SWEEP_FILE).is_file() or _sweep_file(run_dir)["sweep_id"] != sweep_id:
        raise ExportError(
            f"MLflow run {run_id} belongs to the sweep {config['name']!r}, whose run directory {run_dir} is not "
            "on this machine; run this where the sweep was started, or give its run directory"
        )
    return run_dir, trial_id


def _candidate(run_dir: Path, trial_id: str | None) -> Candidate:
    results = current(run_dir)
    trials = {trial["trial_id"]: trial for trial in results["trials"]}
    if trial_id is None and results["best"] is None:
        raise ExportError(
            f"{run_dir}: no trial has ended with a value of {results['metric']}, so none is the best; wait for one, or "
            f"name a trial that has a checkpoint: {run_dir / 'trials'}/ID"
        )
    trial = results["best"] if trial_id is None else trials.get(trial_id)
    if trial is None:
        raise ExportError(f"{run_dir} has no trial {trial_id!r}; its trials are {', '.join(trials)}")
    if trial["reused_from"]:
        raise ExportError(
            f"trial {trial['trial_id']} was not trained here: its result was taken over from MLflow run "
            f"{trial['reused_from']}. Export that one: orpo-ray export {trial['reused_from']}"
        )
    known = _sweep_file(run_dir)
    config = parse(as_given(known["config"]), source=SWEEP_FILE).trial(trial["params"])
    folder = run_dir / "trials" / trial["trial_id"]
    remote = None if config.storage is None else Storage(config.storage) / config.name / "trials" / trial["trial_id"]
    taken = checkpoint_files.chosen(folder, config.checkpoint.keep_best, remote)
    if taken is None:
        raise ExportError(
            f"trial {trial['trial_id']} ({describe(trial['params'])}, {status_text(trial['status'])} after "
            f"{trial['steps']} steps) has no complete checkpoint in {remote or folder}. One is written every "
            "train.checkpoint_every steps (by default at each evaluation, train.eval_every) and after the last step: "
            "set train.checkpoint_every to fewer steps and train it again, or export another trial"
        )
    manifest = checkpoint_files.read_manifest(taken)
    products = precision_name(matmul_dtype(config.train.precision))
    state = read_state(run_dir).trials.get(trial["trial_id"])
    logged: dict[str, float | None] = {}
    if state is not None:
        logged |= state.metrics.get(manifest["step"], {})
        products = state.starts[-1].facts.get("forward/products", products) if state.starts else products
    return Candidate(run_dir, known["sweep_id"], results, trial, config, taken, manifest, logged, products)


def _sweep_file(run_dir: Path) -> dict[str, Any]:
    return dict(read_json(run_dir / SWEEP_FILE))
