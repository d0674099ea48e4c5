"""Sweeps and trials as results read them, the same from a run directory and from MLflow."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from orpo_ray.errors import NoSuchRunError

SEED = "train.seed"
SPACE_PREFIX = "sweep.space."


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial."""

    trial_id: str
    bundle: str
    """Label; "" where there is no bundle axis."""
    purpose: str
    """`search`, or `confirm`: a finalist with another seed."""
    status: str
    """finished, stopped_early, diverged, failed; unfinished before that."""
    params: dict[str, Any]
    """Its place in the space: axis -> value, the seed last. After forks (population-based training) its last."""
    settings: dict[str, Any]
    """Config path -> value, all of them, and what its worker found (`model.parameters`, `forward.rows`, ...)."""
    steps: int
    """Optimizer steps done."""
    attempts: int
    """How often its training was begun; a pause and a resume are one."""
    train_seconds: float | None
    metrics: dict[str, float]
    """Of its last evaluation; NaN where not finite."""
    checkpoint: str | None
    mlflow_run_id: str | None
    reused_from: str | None
    """MLflow run whose result was taken over instead of training."""
    submitted_ms: int | None
    """When it was put in the queue, which is the start of its MLflow run; ms since 1970, UTC."""
    ended_ms: int | None

    @property
    def device_seconds(self) -> float:
        """Training time × workers; 0 where unknown."""
        return (self.train_seconds or 0.0) * int(self.settings.get("scaling.num_workers") or 1)


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """A sweep and its trials, in the order of their submission; a single run is a sweep of one trial."""

    name: str
    metric: str
    mode: Literal["max", "min"]
    axes: tuple[str, ...]
    """Without the seed of confirmation."""
    bundle_axis: str | None
    settings: dict[str, Any]
    """Config path -> value, without what the axes set."""
    search: dict[str, Any]
    """`sweep.metric`, `sweep.scheduler.type`, ... -> value; `sweep.space.AXIS` -> the axis."""
    trials: tuple[TrialRecord, ...]
    run_dir: Path | None
    """Where its files are, if they are here."""
    tracking_uri: str | None
    """Of MLflow; None: the SQLite file beside the run directory."""
    chosen: str | None = None
    """Trial id, where a single trial was asked for."""

    @property
    def chosen_trials(self) -> tuple[TrialRecord, ...]:
        """The trial that was asked for, or all."""
        return tuple(t for t in self.trials if self.chosen in (None, t.trial_id))


def choose(record: SweepRecord, trial_id: str | None) -> SweepRecord:
    """The record with this trial chosen.

    Raises:
        FileNotFoundError: it has no such trial.
    """
    if trial_id is not None and trial_id not in (known := [t.trial_id for t in record.trials]):
        raise NoSuchRunError(
            f"sweep {record.name} has no trial {trial_id!r}; {len(known)} trials"
            + (f", {known[0]} to {known[-1]}" if known else "")
        )
    return replace(record, chosen=trial_id)


def ordered(params: dict[str, Any]) -> dict[str, Any]:
    """By name, the seed last: MLflow does not keep the file's order."""
    return {name: params[name] for name in sorted(params, key=lambda name: (name == SEED, name))}


def number(value: float | None) -> float:
    return math.nan if value is None else float(value)
