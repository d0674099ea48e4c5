"""What is known of a sweep while it runs, from its journal: who trains, how good it is, what is left. No Ray."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

from orpo_ray.planning.cost import CostModel
from orpo_ray.storage.history import ENDED_WELL, LOST, History, TrialHistory


@dataclass(frozen=True, slots=True)
class About:
    """What does not change while a sweep runs."""

    sweep_id: str
    name: str
    run_dir: str
    metric: str
    mode: str
    num_trials: int
    """At most, confirmation included."""
    budget_hours: float | None
    """Device-hours."""
    mlflow: str
    """Address of the server, or the command that shows the runs."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What has happened since the last look."""

    about: About
    events: list[dict[str, Any]]
    """As in the journal; of training metrics only the speed."""
    offset: int
    """Bytes of the journal that have been read; where the next look begins."""
    is_whole: bool
    """Whether that is all there is."""
    is_running: bool
    """Whether a process runs the sweep."""
    is_complete: bool
    """Whether it came to its end, and was not interrupted."""
    stopping: frozenset[str]
    """Trials that a user has asked to stop."""
    time: int
    """Clock where the sweep runs, in milliseconds since 1970."""


@dataclass(slots=True)
class _Now:
    """Of a trial, what `History` does not keep."""

    status: str = "waiting"
    step: int = 0
    group: str = ""
    processes: list[str] = field(default_factory=list)
    pairs_per_second: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Left:
    """What the rest of a sweep takes at most, as if no further trial were stopped early."""

    device_hours: float
    seconds: float | None
    """On the clock with what trains now; None where nothing does."""


class Board:
    """All that is known of a sweep."""

    def __init__(self, reading: Reading) -> None:
        """Begin with the first reading, whose events start at the journal's beginning."""
        self.about = reading.about
        self.history = History()
        self.now: dict[str, _Now] = {}
        self._parameters: dict[str, int] = {}
        self._began: int | None = None
        self._last = 0
        self._reading = reading
        self.take(reading)

    def take(self, reading: Reading) -> None:
        """Take note of what is new."""
        self._reading = reading
        for event in reading.events:
            self._apply(event)

    def _apply(self, event: dict[str, Any]) -> None:
        self.history.apply(event)
        self._began, self._last = self._began or event["time"], event["time"]
        trial = self.now.setdefault(event["trial_id"], _Now())
        match event["event"]:
            case "started":
                self._forget_other_runs(event["group"] or "")
                trial.status, trial.step, trial.group = "training", event["step"], event["group"] or ""
                trial.processes = event["processes"]
                if (size := event["facts"].get("model/parameters")) is not None:
                    self._parameters[self.history.trials[event["trial_id"]].bundle] = size
            case "log":
                trial.step = event["step"]
                trial.pairs_per_second = event["metrics"].get("perf/pairs_per_second")
            case "eval":
                trial.step = event["step"]
            case "paused":
                trial.status = "paused"
            case "preempted":
                trial.status = "waiting"
            case "forked":
                trial.step = event["step"]
            case "retry":
                trial.status, trial.error = "waiting", event["error"]
            case "finished":
                trial.status, trial.step, trial.error = event["status"], event["steps"], event["error"]

    def _forget_other_runs(self, group: str) -> None:
        """A group's name begins with when its sweep was started: trials of an earlier start do not train any more."""
        run = group.rpartition("-")[0]
        for trial in self.now.values():
            if trial.status == "training" and trial.group.rpartition("-")[0] != run:
                trial.status = "waiting"

    @property
    def state(self) -> str:
        """`running`, `ended`, or `interrupted`, by the user or by a crash."""
        return "running" if self._reading.is_running else "ended" if self._reading.is_complete else "interrupted"

    def status(self, trial_id: str) -> str:
        """`waiting`, `training`, `paused`, `stopping`, `interrupted`, or how the trial ended."""
        status = self.now[trial_id].status
        if status in (*ENDED_WELL, *LOST):
            return status
        if self._reading.is_running:
            return "stopping" if trial_id in self._reading.stopping else status
        return "interrupted"

    def counts(self) -> dict[str, int]:
        """Status -> number of trials."""
        return dict(Counter(self.status(trial_id) for trial_id in self.now))

    def ranked(self) -> list[TrialHistory]:
        """Trials, best first; then those without a value, in the order of submission; lost ones last."""
        sign = -1.0 if self.about.mode == "max" else 1.0

        def place(trial: TrialHistory) -> tuple[bool, bool, float]:
            value = trial.value(self.about.metric)
            return trial.status in LOST, value is None, 0.0 if value is None else sign * value

        return sorted(self.history.trials.values(), key=place)

    def curve(self, trial_id: str) -> list[tuple[int, float]]:
        """(step, finite value of the metric), in order."""
        metrics = sorted(self.history.trials[trial_id].metrics.items())
        points = [(step, found.get(self.about.metric, math.nan)) for step, found in metrics]
        return [(step, value) for step, value in points if value is not None and math.isfinite(value)]

    @property
    def ended(self) -> int:
        """Trials."""
        return sum(trial.status is not None for trial in self.history.trials.values())

    @property
    def seconds(self) -> float:
        """From the first trial until now, or until the last event of a sweep that does not run."""
        if self._began is None:
            return 0.0
        return ((self._reading.time if self._reading.is_running else self._last) - self._began) / 1000.0

    def left(self) -> Left | None:
        """None before a trial has been measured, and when nothing is left.

        A trial costs its bundle's device-seconds a step (`cost.CostModel`); of trials not yet proposed the bundle is
        unknown, and they cost the mean of the bundles.
        """
        trials = list(self.history.trials.values())
        devices = {t.bundle: t.devices for t in trials if t.bundle in self._parameters}
        rates = CostModel(self._parameters, devices).rates(self.history)
        known = {t.bundle: t.max_steps for t in trials if t.max_steps is not None}
        if not rates or self.state == "ended":
            return None
        typical_rate, typical_steps = mean(rates.values()), median(known.values())
        seconds = typical_rate * typical_steps * max(self.about.num_trials - len(trials), 0)
        for trial in trials:
            if trial.status is None:
                steps = trial.max_steps or known.get(trial.bundle) or typical_steps
                done = max(self.now[trial.trial_id].step, trial.step)
                seconds += rates.get(trial.bundle, typical_rate) * max(steps - done, 0)
        if self.about.budget_hours is not None:
            seconds = min(seconds, max(self.about.budget_hours - self.history.device_hours, 0.0) * 3600.0)
        busy = sum(t.devices for t in trials if self.status(t.trial_id) in ("training", "stopping"))
        return Left(seconds / 3600.0, seconds / busy if busy else None)

    def to_json(self) -> str:
        """One object: the sweep, its trials (best first) and its groups."""
        left = self.left()
        trials = [
            {
                "trial_id": trial.trial_id,
                "params": trial.params,
                "bundle": trial.bundle,
                "purpose": trial.purpose,
                "status": self.status(trial.trial_id),
                "step": self.now[trial.trial_id].step,
                "max_steps": trial.max_steps,
                "value": trial.value(self.about.metric),
                "curve": self.curve(trial.trial_id),
                "device_seconds": trial.device_seconds,
                "error": self.now[trial.trial_id].error,
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
            "counts": self.counts(),
            "seconds": self.seconds,
            "device_hours": self.history.device_hours,
            "budget_device_hours": about.budget_hours,
            "device_hours_left": None if left is None else left.device_hours,
            "seconds_left": None if left is None else left.seconds,
            "mlflow": about.mlflow,
            "trials": trials,
            "groups": [{"group": name, "trial_id": t, "processes": p} for name, t, p in self.groups()],
        }
        return json.dumps(sweep, ensure_ascii=False, allow_nan=False)

    def groups(self) -> list[tuple[str, str, list[str]]]:
        """(name, trial, `host:pid` of each rank) of the worker groups that train now."""
        busy = [(now.group, t, now.processes) for t, now in self.now.items() if now.status == "training"]
        return sorted(busy) if self._reading.is_running else []
