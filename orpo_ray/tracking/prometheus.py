"""Metrics of a sweep for Prometheus, through Ray's own exporter on the node of the sweep's process.

Ray prefixes every name with `ray_`, and gives a counter the suffix `_total`. It drops a gauge that has not been set for
two report intervals (20 s): so those of a trial that has ended go away by themselves, and all others are set again and
again (docs.ray.io, application-level metrics). Names and labels: docs/observability.md.
"""

from __future__ import annotations

import math
import time
from collections import Counter as Tally
from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from orpo_ray.orchestration.broker import Load

REFRESH_S = 5.0
"""Gauges are set this often; Ray reports every 10 s."""
STATES = ("waiting", "training", "paused", "finished", "stopped_early", "diverged", "failed")
_DURATIONS = [10.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 4 * 3600.0, 12 * 3600.0, 24 * 3600.0]

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "orpo_ray_trials": ("Trials by state", ("sweep", "state")),
    "orpo_ray_best": ("Best value so far of the metric that the sweep is judged by", ("sweep", "metric")),
    "orpo_ray_worker_groups": ("Worker groups that are up, busy or idle", ("sweep", "state")),
    "orpo_ray_trials_queued": ("Trials that wait for a worker group", ("sweep",)),
    "orpo_ray_mlflow_backlog": ("Events that MLflow has not taken yet", ("sweep",)),
    "orpo_ray_trial_step": ("Optimizer step of a trial in training", ("sweep", "trial")),
    "orpo_ray_trial_max_steps": ("Optimizer steps that it is to take", ("sweep", "trial")),
    "orpo_ray_trial_loss": ("Its training loss", ("sweep", "trial")),
    "orpo_ray_trial_metric": ("Its last held-out value of that metric", ("sweep", "trial", "metric")),
    "orpo_ray_trial_pairs_per_second": ("Preference pairs it trains on per second", ("sweep", "trial")),
    "orpo_ray_trial_tokens_per_second": ("Tokens it trains on per second", ("sweep", "trial")),
    "orpo_ray_trial_peak_memory_bytes": ("Memory of its rank 0", ("sweep", "trial")),
}
"""Name -> description and labels."""
COUNTERS = {
    "orpo_ray_retries": "Trials handed out again after a failure of their worker group",
    "orpo_ray_evaluations": "Held-out evaluations",
    "orpo_ray_forks": "Exploits of population-based training",
}
"""Name -> description; all with the label `sweep`."""
HISTOGRAM = "orpo_ray_trial_train_seconds"
"""Seconds of training of ended trials, with the labels `sweep` and `state`."""

_TRIAL_METRICS = {
    "train/loss": ("orpo_ray_trial_loss", 1.0),
    "perf/pairs_per_second": ("orpo_ray_trial_pairs_per_second", 1.0),
    "perf/tokens_per_second": ("orpo_ray_trial_tokens_per_second", 1.0),
    "perf/peak_memory_gib": ("orpo_ray_trial_peak_memory_bytes", 2.0**30),
}


@dataclass(slots=True)
class _Trial:
    state: str = "waiting"
    values: dict[str, float] | None = None
    """Gauge -> value, while in training."""
    metric: float | None = None


class SweepMetrics:
    """Follows the journal's events and keeps Ray's metrics up to date. Not thread-safe; needs a Ray connection.

    A sweep that is continued counts from its journal, so its counters begin where they were.
    """

    def __init__(self, sweep: str, metric: str, mode: str) -> None:
        """Args:
        sweep: name of the sweep.
        metric: that it is judged by.
        mode: `min` or `max`.
        """
        self._label = {"sweep": sweep}
        self._metric, self._better = metric, min if mode == "min" else max
        self._trials: dict[str, _Trial] = {}
        self._best: float | None = None
        self._gauges = {name: Gauge(name, text, labels) for name, (text, labels) in GAUGES.items()}
        self._counters = {name: Counter(name, text, ("sweep",)) for name, text in COUNTERS.items()}
        self._seconds = Histogram(HISTOGRAM, "Training time of ended trials", _DURATIONS, ("sweep", "state"))
        self._due_at = 0.0

    def handle(self, events: list[dict[str, Any]]) -> None:
        """Take note of events, in order. The first ones of a sweep that is continued are its journal."""
        resumed = not self._trials and any(event["event"] == "started" for event in events)
        for event in events:
            self._take(event)
        if resumed:  # nobody trains yet
            for trial in self._trials.values():
                if trial.state in ("training", "paused"):
                    trial.state, trial.values = "waiting", None

    def _take(self, event: dict[str, Any]) -> None:
        trial = self._trials.setdefault(event["trial_id"], _Trial())
        match event["event"]:
            case "started":
                trial.state = "training"
                trial.values = {"orpo_ray_trial_step": event["step"], "orpo_ray_trial_max_steps": event["max_steps"]}
            case "log" if trial.values is not None:
                trial.values["orpo_ray_trial_step"] = event["step"]
                for name, (gauge, factor) in _TRIAL_METRICS.items():
                    if (value := event["metrics"].get(name)) is not None:
                        trial.values[gauge] = factor * value
            case "eval":
                self._counters["orpo_ray_evaluations"].inc(1.0, self._label)
                value = event["metrics"].get(self._metric)
                if value is not None and math.isfinite(value):
                    trial.metric = value
                    self._best = value if self._best is None else self._better(self._best, value)
            case "paused":
                trial.state, trial.values = "paused", None
            case "preempted":
                trial.state, trial.values = "waiting", None
            case "forked":
                self._counters["orpo_ray_forks"].inc(1.0, self._label)
            case "retry":
                self._counters["orpo_ray_retries"].inc(1.0, self._label)
                trial.state, trial.values = "waiting", None
            case "finished":
                trial.state, trial.values = event["status"], None
                self._due_at = 0.0  # at once: after the last trial there may be no other occasion
                self._seconds.observe(event["train_seconds"], {**self._label, "state": trial.state})

    @property
    def is_due(self) -> bool:
        """Whether it is time for `refresh`."""
        return time.monotonic() >= self._due_at

    def refresh(self, load: Load, backlog: int) -> None:
        """Set every gauge.

        Args:
            load: the broker's.
            backlog: events that MLflow has not taken yet.
        """
        self._due_at = time.monotonic() + REFRESH_S
        states = Tally(trial.state for trial in self._trials.values())
        for state in STATES:
            self._set("orpo_ray_trials", states[state], state=state)
        self._set("orpo_ray_worker_groups", len(load.busy), state="busy")
        self._set("orpo_ray_worker_groups", len(load.idle_seconds), state="idle")
        self._set("orpo_ray_trials_queued", sum(load.queued.values()))
        self._set("orpo_ray_mlflow_backlog", backlog)
        if self._best is not None:
            self._set("orpo_ray_best", self._best, metric=self._metric)
        for trial_id, trial in self._trials.items():
            if trial.values is None:
                continue
            for gauge, value in trial.values.items():
                self._set(gauge, value, trial=trial_id)
            if trial.metric is not None:
                self._set("orpo_ray_trial_metric", trial.metric, trial=trial_id, metric=self._metric)

    def _set(self, gauge: str, value: float, **labels: str) -> None:
        if math.isfinite(value):  # a diverging loss has no place on an axis
            self._gauges[gauge].set(value, {**self._label, **labels})
