"""State of a running sweep for the live views: its trials, their ranking, and the remaining cost. No Ray."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from orpo_ray.config import ExperimentConfig
from orpo_ray.planning.cost import CostModel
from orpo_ray.provenance import without_password
from orpo_ray.storage.events import Event, Status
from orpo_ray.storage.sweep_state import SweepState, TrialState
from orpo_ray.tracking.uri import resolve_uri, ui_command


@dataclass(frozen=True, slots=True)
class About:
    """Facts of a sweep that do not change while it runs."""

    sweep_id: str
    name: str
    run_dir: str
    metric: str
    mode: str
    num_trials: int
    """Largest number of trials, confirmation included."""
    budget_hours: float | None
    """Device-hours."""
    mlflow: str
    """Address of the MLflow server, or the command that opens its UI."""


def about_sweep(config: ExperimentConfig, sweep_id: str, run_dir: Path) -> About:
    """Facts from the config; a config without `sweep` is a sweep of one trial."""
    config, sweep = config.as_sweep()
    return About(
        sweep_id=sweep_id,
        name=config.name,
        run_dir=str(run_dir),
        metric=sweep.metric,
        mode=sweep.mode,
        num_trials=sweep.num_trials + sweep.num_confirmations,
        budget_hours=sweep.budget.device_hours if sweep.budget else None,
        mlflow=without_password(ui_command(resolve_uri(config.tracking.uri, run_dir.absolute().parent))),
    )


@dataclass(frozen=True, slots=True)
class Reading:
    """Events since the last read, and the status of the sweep's process."""

    about: About
    events: list[Event]
    """New events; training metrics are reduced to the speed."""
    offset: int
    """Byte of the journal at which the next read begins."""
    is_whole: bool
    """Whether the end of the journal was reached."""
    is_running: bool
    """Whether a process runs the sweep."""
    is_complete: bool
    """Whether the sweep has ended and was not interrupted."""
    stopping: frozenset[str]
    """Trials that a user has asked to stop."""
    time: int
    """Clock of the sweep's machine, in milliseconds since 1970, UTC."""


@dataclass(frozen=True, slots=True)
class Left:
    """Upper bound of a sweep's remaining cost, assuming that no further trial is stopped early."""

    device_hours: float
    seconds: float | None
    """Wall-clock seconds with the devices that train now; None if none does."""


class LiveSweep:
    """State of a sweep, from its journal, and whether a process runs it."""

    def __init__(self, about: About) -> None:
        """Start without events; add them with `take`, or by `sweep.apply`, from the journal's beginning."""
        self.about = about
        self.sweep = SweepState()
        self.is_running = True
        self.is_complete = False
        self.stopping: frozenset[str] = frozenset()
        """Trials that a user has asked to stop."""
        self.now_ms: int | None = None
        """Clock of the sweep's machine, in milliseconds since 1970, UTC; None: this machine's."""

    def take(self, reading: Reading) -> None:
        """Add a reading."""
        self.is_running, self.is_complete = reading.is_running, reading.is_complete
        self.stopping, self.now_ms = reading.stopping, reading.time
        for event in reading.events:
            self.sweep.apply(event)

    @property
    def state(self) -> str:
        """`running`, `ended`, or `interrupted`, by the user or by a crash."""
        return "running" if self.is_running else "ended" if self.is_complete else "interrupted"

    def status(self, trial: TrialState) -> Status:
        """The trial's status, also considering whether the sweep runs and whether the user has stopped the trial."""
        if trial.status.has_ended:
            return trial.status
        if not self.is_running:
            return Status.INTERRUPTED
        return Status.STOPPING if trial.trial_id in self.stopping else trial.status

    def counts(self) -> Counter[Status]:
        """Number of trials by status."""
        return Counter(self.status(trial) for trial in self.sweep.trials.values())

    def ranked(self) -> list[TrialState]:
        """Trials, best first; then those without a value, in the order of submission; lost ones last."""
        sign = -1.0 if self.about.mode == "max" else 1.0

        def place(trial: TrialState) -> tuple[bool, bool, float]:
            value = trial.value(self.about.metric)
            return trial.status.is_lost, value is None, 0.0 if value is None else sign * value

        return sorted(self.sweep.trials.values(), key=place)

    def curve(self, trial: TrialState) -> list[tuple[int, float]]:
        """(step, finite value of the metric), in order."""
        points = [(step, found.get(self.about.metric, math.nan)) for step, found in sorted(trial.metrics.items())]
        return [(step, value) for step, value in points if value is not None and math.isfinite(value)]

    @property
    def seconds(self) -> float:
        """Seconds from the first trial until now, or until the last event of a sweep that does not run."""
        if self.sweep.began_ms is None:
            return 0.0
        now = int(time.time() * 1000) if self.now_ms is None else self.now_ms
        return ((now if self.is_running else self.sweep.last_ms) - self.sweep.began_ms) / 1000.0

    def left(self) -> Left | None:
        """Remaining cost; None before a trial has been measured, and after the end.

        A trial's step costs its bundle's device-seconds (`planning.cost.CostModel`). The bundle of a trial not proposed
        yet is unknown, so it costs the mean over bundles.
        """
        trials = list(self.sweep.trials.values())
        devices = {t.bundle: t.devices for t in trials if t.bundle in self.sweep.parameters}
        rates = CostModel(self.sweep.parameters, devices).rates(self.sweep)
        known = {t.bundle: t.max_steps for t in trials if t.max_steps is not None}
        if not rates or self.state == "ended":
            return None
        typical_rate, typical_steps = mean(rates.values()), median(known.values())
        seconds = typical_rate * typical_steps * max(self.about.num_trials - len(trials), 0)
        for trial in trials:
            if not trial.status.has_ended:
                steps = trial.max_steps or known.get(trial.bundle) or typical_steps
                done = max(trial.step, trial.evaluated_step)
                seconds += rates.get(trial.bundle, typical_rate) * max(steps - done, 0)
        if self.about.budget_hours is not None:
            seconds = min(seconds, max(self.about.budget_hours - self.sweep.device_hours, 0.0) * 3600.0)
        busy = sum(t.devices for t in trials if self.status(t) in (Status.TRAINING, Status.STOPPING))
        return Left(seconds / 3600.0, seconds / busy if busy else None)

    def to_json(self) -> str:
        """The sweep, its trials (best first) and its groups, as a JSON object."""
        left = self.left()
        trials = [
            {
                "trial_id": trial.trial_id,
                "params": trial.params,
                "bundle": trial.bundle,
                "purpose": trial.purpose,
                "status": self.status(trial),
                "step": trial.step,
                "max_steps": trial.max_steps,
                "value": trial.value(self.about.metric),
                "curve": self.curve(trial),
                "device_seconds": trial.device_seconds,
                "error": trial.error,
            }
            for trial in self.ranked()
        ]
        about = self.about
        sweep = {
            "name": about.name,
            "run_dir": about.run_dir,
            "state": self.state,
            "metric": about.metric,
            "mode": about.mode,
            "num_trials": about.num_trials,
            "counts": dict(self.counts()),
            "seconds": self.seconds,
            "device_hours": self.sweep.device_hours,
            "budget_device_hours": about.budget_hours,
            "device_hours_left": None if left is None else left.device_hours,
            "seconds_left": None if left is None else left.seconds,
            "mlflow": about.mlflow,
            "trials": trials,
            "groups": [{"group": name, "trial_id": t, "processes": p} for name, t, p in self.groups()],
        }
        return json.dumps(sweep, ensure_ascii=False, allow_nan=False)

    def groups(self) -> list[tuple[str, str, list[str]]]:
        """(name, trial id, `host:pid` of each rank) of the worker groups that train now."""
        trials = self.sweep.trials.values() if self.is_running else ()
        return sorted((t.group, t.trial_id, t.processes) for t in trials if t.status is Status.TRAINING)
