"""Sweeps and trials as the results code reads them, from a run directory or from MLflow."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from orpo_ray.errors import NoSuchRunError
from orpo_ray.storage.events import Status

SEED = "train.seed"
SPACE_PREFIX = "sweep.space."


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial of a sweep."""

    trial_id: str
    bundle: str
    """Label of its bundle; "" without a bundle axis."""
    purpose: str
    """`search`, or `confirm`: a finalist trained with another seed."""
    status: Status
    """Value of `storage.events.Status`: how it ended, or `unfinished`."""
    params: dict[str, Any]
    """Axis -> value, the seed last; after forks (population-based training), the latest values."""
    settings: dict[str, Any]
    """Config path -> value of all settings, and values from its worker (`model.parameters`, `forward.rows`, ...)."""
    steps: int
    """Optimizer steps done."""
    attempts: int
    """Number of attempts; training before and after a pause is one attempt."""
    train_seconds: float | None
    metrics: dict[str, float]
    """Held-out metrics of its last evaluation; NaN where not finite."""
    checkpoint: str | None
    mlflow_run_id: str | None
    reused_from: str | None
    """MLflow run whose result was used instead of training."""
    submitted_ms: int | None
    """When it was first queued, i.e. the start of its MLflow run; milliseconds since 1970, UTC."""
    ended_ms: int | None

    @property
    def device_seconds(self) -> float:
        """Training time × workers, in seconds; 0 if unknown."""
        return (self.train_seconds or 0.0) * int(self.settings.get("scaling.num_workers") or 1)


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """A sweep and its trials, in the order of their submission; a single run is a sweep of one trial."""

    name: str
    metric: str
    mode: Literal["max", "min"]
    axes: tuple[str, ...]
    """Names of the axes, without the seed of confirmation trials."""
    bundle_axis: str | None
    settings: dict[str, Any]
    """Config path -> value, without settings that the axes set."""
    search: dict[str, Any]
    """`sweep.metric`, `sweep.scheduler.type`, ... -> value; `sweep.space.AXIS` -> the axis."""
    trials: tuple[TrialRecord, ...]
    run_dir: Path | None
    """Run directory, if it is on this machine."""
    tracking_uri: str | None
    """MLflow tracking URI; None: the SQLite file beside the run directory."""
    chosen: str | None = None
    """Trial id, if a single trial was requested."""

    @property
    def chosen_trials(self) -> tuple[TrialRecord, ...]:
        """The requested trial, or all trials."""
        return tuple(t for t in self.trials if self.chosen in (None, t.trial_id))


def choose(record: SweepRecord, trial_id: str | None) -> SweepRecord:
    """The record with this trial chosen.

    Raises:
        NoSuchRunError: the sweep has no such trial.
    """
    if trial_id is not None and trial_id not in (known := [t.trial_id for t in record.trials]):
        raise NoSuchRunError(
            f"sweep {record.name} has no trial {trial_id!r}; {len(known)} trials"
            + (f", {known[0]} to {known[-1]}" if known else "")
        )
    return replace(record, chosen=trial_id)


def ordered(params: dict[str, Any]) -> dict[str, Any]:
    """Params sorted by name with the seed last, because MLflow does not keep the file's order."""
    return {name: params[name] for name in sorted(params, key=lambda name: (name == SEED, name))}


def number(value: float | None) -> float:
    """The value as a float; NaN for None."""
    return math.nan if value is None else float(value)
