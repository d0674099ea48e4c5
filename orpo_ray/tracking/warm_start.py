"""Reuse results of earlier MLflow runs: finished trials that differ from this sweep's only in its axes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from orpo_ray.config import ExperimentConfig, SweepConfig
from orpo_ray.config.flatten import SPEED_ONLY, as_text, settings_of
from orpo_ray.config.space import Axis, Bundle, Choice, Grid, LogUniform, Uniform
from orpo_ray.files import read_json, write_atomically
from orpo_ray.storage.events import Evaluated, Finished, Status
from orpo_ray.storage.sweep_state import TrialState
from orpo_ray.tracking.read_runs import search_all_runs
from orpo_ray.tracking.uri import TrackingError

WARM_START_FILE = "warm_start.json"
"""File with the trials found when the sweep first started; a continued sweep keeps them."""


@dataclass(frozen=True, slots=True)
class WarmStart:
    """Trials found for a warm start."""

    trials: dict[str, TrialState]
    """`mlflow:RUN_ID` -> trial."""
    message: str
    """Number of usable trials and of all finished ones; if none is usable, the settings that differ most often."""


def load(config: ExperimentConfig, sweep: SweepConfig, uri: str, parent_id: str) -> WarmStart:
    """Finished trials of the MLflow experiment `sweep.warm_start` that this sweep can learn from.

    Args:
        config: the experiment.
        sweep: its sweep, which names the MLflow experiment to read.
        uri: tracking URI.
        parent_id: this sweep's own parent run, whose trials are left out.

    Raises:
        TrackingError: there is no such experiment.
    """
    assert sweep.warm_start is not None
    file = config.run_dir / WARM_START_FILE
    if file.exists():
        return _read(file)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(sweep.warm_start)
    if experiment is None:
        raise TrackingError(
            f"sweep.warm_start {sweep.warm_start}: no MLflow experiment of this name at the tracking URI; correct it, "
            "or drop it to start from nothing"
        )
    trials: dict[str, TrialState] = {}
    differences: Counter[str] = Counter()
    seen = 0
    for run in search_all_runs(client, [experiment.experiment_id], f"tags.`orpo_ray.status` = '{Status.FINISHED}'"):
        if run.data.tags.get("mlflow.parentRunId") == parent_id or "orpo_ray.reused_from" in run.data.tags:
            continue
        seen += 1
        params, differs = _params_of(run, config, sweep)
        differences.update(differs)
        if params is not None:
            trial = _trial(run, params, sweep)
            trials[trial.trial_id] = trial
    message = f"warm start: {len(trials)} of {seen} finished trials of {sweep.warm_start} differ only in the axes"
    if seen and not trials:
        message += "; most differ in " + ", ".join(name for name, _ in differences.most_common(3))
    found = WarmStart(trials, message)
    write_atomically(file, json.dumps({"trials": _known(trials), "message": message}, indent=1))
    return found


def _params_of(run: Run, config: ExperimentConfig, sweep: SweepConfig) -> tuple[dict[str, Any] | None, list[str]]:
    """The run's params in this sweep's space; None, and the settings that do not match, if it lies outside."""
    theirs = run.data.params
    params: dict[str, Any] = {}
    differs: list[str] = []
    for name, axis in sweep.space.items():
        value = _value_on(axis, name, theirs)
        if value is None:
            differs.append(name)
        else:
            params[name] = value
    if differs:
        return None, differs
    ours = {path: as_text(value) for path, value in settings_of(config.trial(params)).items()}
    moved = {path for name in params for path in config.settings({name: params[name]})}
    for path, text in ours.items():
        if path not in moved and not path.startswith(SPEED_ONLY) and theirs.get(path) != text:
            differs.append(path)
    return (None if differs else params), differs


def _value_on(axis: Axis, name: str, theirs: dict[str, str]) -> Any:
    match axis:
        case Bundle():
            for label, settings in axis.values.items():
                numbers = {p: v for p, v in settings.items() if not p.startswith(SPEED_ONLY)}
                if all(theirs.get(path) == as_text(value) for path, value in numbers.items()):
                    return label
        case Grid() | Choice():
            return next((value for value in axis.candidates() if theirs.get(name) == as_text(value)), None)
        case Uniform() | LogUniform():
            try:
                value = float(theirs.get(name, "nan"))
            except ValueError:
                return None
            return value if axis.low <= value <= axis.high else None
    return None


def _trial(run: Run, params: dict[str, Any], sweep: SweepConfig) -> TrialState:
    final = {k.removeprefix("final/"): v for k, v in run.data.metrics.items() if k.startswith("final/")}
    step = int(final.pop("steps"))
    final.pop("train_seconds", None)
    metrics = {f"eval/{name}": value for name, value in final.items()}
    return _finished(f"mlflow:{run.info.run_id}", params, sweep.bundle_of(params), step, metrics, run.info.run_id)


def _finished(
    trial_id: str, params: dict[str, Any], bundle: str, step: int, metrics: dict[str, float], run_id: str
) -> TrialState:
    """A trial that an earlier MLflow run trained to its end."""
    trial = TrialState(trial_id, params, bundle, max_steps=step)
    trial.apply(Evaluated(trial_id=trial_id, step=step, metrics=metrics))
    trial.apply(Finished.reused(trial_id, step, metrics, run_id))
    return trial


def _known(trials: dict[str, TrialState]) -> dict[str, dict[str, Any]]:
    """What `_read` needs of each trial."""
    return {
        trial_id: {
            "params": trial.params,
            "bundle": trial.bundle,
            "max_steps": trial.max_steps,
            "metrics": trial.metrics,
            "reused_from": trial.reused_from,
        }
        for trial_id, trial in trials.items()
    }


def _read(file: Path) -> WarmStart:
    tree = read_json(file)
    trials = {}
    for trial_id, known in tree["trials"].items():
        ((step, metrics),) = known["metrics"].items()
        arguments = (known["params"], known["bundle"], int(step), metrics, known["reused_from"])
        trials[trial_id] = _finished(trial_id, *arguments)
    return WarmStart(trials, tree["message"])
