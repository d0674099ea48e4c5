"""The two sides of a comparison: which runs of a sweep are compared, and what describes them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from orpo_ray.config import METRIC_MODES
from orpo_ray.config.space import describe
from orpo_ray.errors import UserError
from orpo_ray.formatting import ended_as
from orpo_ray.results.frames import setting_key, setting_of
from orpo_ray.storage.events import Status
from orpo_ray.storage.records import SweepRecord, TrialRecord


class CompareError(UserError, ValueError):
    """The two sides cannot be compared; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Side:
    """Description of one side."""

    name: str
    """`SWEEP` or `SWEEP/TRIAL_ID`."""
    is_sweep: bool
    """Whether this side is a sweep's best setting; else it is a single run."""
    setting: str
    """Short name of the setting of the compared runs."""
    trial_ids: tuple[str, ...]
    """Compared runs: one, or the seeds of a setting; the best first."""
    mlflow_run_id: str | None
    """MLflow run of the first compared run."""
    checkpoint: str | None
    """Checkpoint of the first compared run."""
    steps: int
    """Optimizer steps of the first compared run."""
    status: Status
    """Status of the first compared run."""
    candidates: int
    """Number of settings it was chosen from by the score compared here; 1 where nothing was chosen."""
    trials: int
    statuses: dict[str, int]
    """Status -> number of trials."""
    device_hours: float
    """Training time × workers, over all trials of a sweep or for the single run."""
    wall_hours: float | None
    """From the first submission to the last end; None where a trial has not ended."""


@dataclass(frozen=True, slots=True)
class Runs:
    """The compared runs of a sweep: one, or the seeds of a setting."""

    record: SweepRecord
    runs: tuple[TrialRecord, ...]
    """The best first."""
    is_sweep: bool
    candidates: int

    @classmethod
    def best(cls, record: SweepRecord, metric: str, label: str) -> Runs:
        """The run asked for, or the seeds of the best setting.

        As in `winners`, finalists are judged by their fresh seeds alone; without finalists, all finished trials count.

        Args:
            record: the sweep, perhaps with one chosen trial.
            metric: the metric to judge by.
            label: `A` or `B`, for error messages.

        Raises:
            CompareError: no run has a value of the metric.
        """
        is_sweep = record.chosen is None and len(record.trials) > 1
        valued = [t for t in record.chosen_trials if not math.isnan(t.metrics.get(metric, math.nan))]
        if not valued:
            known = sorted({key for t in record.chosen_trials for key in t.metrics})
            counts = Counter(t.status.value for t in record.chosen_trials)
            raise CompareError(
                f"{label} ({record_name(record)}) has no value of {metric}: {ended_as(counts)}; it has "
                f"{', '.join(known) if known else 'no evaluation at all'}"
            )
        if not is_sweep:
            return cls(record, tuple(valued), is_sweep, candidates=1)
        finished = distinct([t for t in valued if t.status is Status.FINISHED])
        confirmed = [t for t in finished if t.purpose == "confirm"]
        judged = confirmed or finished or [t for t in valued if t.status is Status.STOPPED_EARLY] or valued
        settings = by_key([(setting_key(t.params), t) for t in judged])
        sign = 1 if METRIC_MODES[metric] == "max" else -1
        groups = [sorted(group, key=lambda t: sign * t.metrics[metric], reverse=True) for group in settings.values()]
        chosen = max(groups, key=lambda group: sign * float(np.mean([t.metrics[metric] for t in group])))
        return cls(record, tuple(chosen), is_sweep, candidates=1 if confirmed else len(settings))

    @property
    def name(self) -> str:
        return record_name(self.record)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the best run, without a bundle's label."""
        return {path: value for path, value in self.runs[0].settings.items() if path != self.record.bundle_axis}

    @property
    def swept(self) -> set[str]:
        """Config paths that the axes set."""
        return swept_paths(self.record) if self.is_sweep else set()

    def same_as(self, other: Runs) -> bool:
        """Whether both sides are the same runs of the same sweep."""
        mine, theirs = ([(t.trial_id, t.mlflow_run_id, t.submitted_ms) for t in g.runs] for g in (self, other))
        return self.record.name == other.record.name and mine == theirs and self.is_sweep == other.is_sweep

    def side(self) -> Side:
        """Describe these runs."""
        trials, first = self.record.chosen_trials, self.runs[0]
        begun = [t.submitted_ms for t in trials if t.submitted_ms is not None]
        ended = [t.ended_ms for t in trials if t.ended_ms is not None]
        return Side(
            name=self.name,
            is_sweep=self.is_sweep,
            setting=describe(setting_of(first.params) if len(self.runs) > 1 else first.params),
            trial_ids=tuple(t.trial_id for t in self.runs),
            mlflow_run_id=first.mlflow_run_id,
            checkpoint=first.checkpoint,
            steps=first.steps,
            status=first.status,
            candidates=self.candidates,
            trials=len(trials),
            statuses=dict(Counter(t.status for t in trials)),
            device_hours=sum(t.device_seconds for t in trials) / 3600,
            wall_hours=(max(ended) - min(begun)) / 3.6e6 if len(ended) == len(begun) == len(trials) else None,
        )


def record_name(record: SweepRecord) -> str:
    """`SWEEP`, or `SWEEP/TRIAL_ID` for a chosen trial."""
    return record.name if record.chosen is None else f"{record.name}/{record.chosen}"


def distinct(trials: list[TrialRecord]) -> list[TrialRecord]:
    """Drop repetitions of a setting with the same seed: they are the same run, not further seeds."""
    return list({repr(sorted(t.params.items())): t for t in reversed(trials)}.values())[::-1]


def by_key(keyed: Sequence[tuple[str, TrialRecord]]) -> dict[str, list[TrialRecord]]:
    """Group (key, trial) pairs by key, in the order of keys."""
    ordered = sorted(keyed, key=lambda item: item[0])
    return {key: [trial for _, trial in group] for key, group in groupby(ordered, key=lambda item: item[0])}


def swept_paths(record: SweepRecord) -> set[str]:
    """Config paths that the axes set, including those inside a bundle."""
    if record.bundle_axis is None:
        return set(record.axes)
    bundle = record.search[f"sweep.space.{record.bundle_axis}"]
    inside = {path for settings in bundle["values"].values() for path in settings}
    return (set(record.axes) - {record.bundle_axis}) | inside
