"""Metrics of a sweep for Prometheus, through Ray's exporter on the node of the sweep's process.

Ray prefixes every name with `ray_`, and gives a counter the suffix `_total`. It drops a gauge that has not been set for
two report intervals (20 s): so gauges of an ended trial disappear by themselves, and all others are set repeatedly
(docs.ray.io, application-level metrics). Names and labels: docs/observability.md.
"""

from __future__ import annotations

import math
import time
from collections import Counter as Tally

from ray.util.metrics import Counter, Gauge, Histogram

from orpo_ray.storage.events import ENDS, Evaluated, Event, Finished, Forked, Retried, Started, Status
from orpo_ray.storage.sweep_state import SweepState, TrialState

REFRESH_S = 5.0
"""Interval between settings of the gauges; Ray reports every 10 s."""
STATES = (Status.WAITING, Status.TRAINING, Status.PAUSED, *ENDS)
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
"""Name -> description; all have the label `sweep`."""
HISTOGRAM = "orpo_ray_trial_train_seconds"
"""Training seconds of ended trials, with the labels `sweep` and `state`."""

_TRIAL_METRICS = {
    "train/loss": ("orpo_ray_trial_loss", 1.0),
    "perf/pairs_per_second": ("orpo_ray_trial_pairs_per_second", 1.0),
    "perf/tokens_per_second": ("orpo_ray_trial_tokens_per_second", 1.0),
    "perf/peak_memory_gib": ("orpo_ray_trial_peak_memory_bytes", 2.0**30),
}


class SweepMetrics:
    """Applies journal events and sets Ray's metrics. Not thread-safe; needs a Ray connection.

    A continued sweep replays its journal, so its counters resume at their previous values.
    """

    def __init__(self, sweep: str, metric: str, mode: str) -> None:
        """Args:
        sweep: name of the sweep.
        metric: held-out metric of the sweep.
        mode: `min` or `max`.
        """
        self._label = {"sweep": sweep}
        self._metric, self._better = metric, min if mode == "min" else max
        self._state = SweepState()
        self._best: float | None = None
        self._gauges = {name: Gauge(name, text, labels) for name, (text, labels) in GAUGES.items()}
        self._counters = {name: Counter(name, text, ("sweep",)) for name, text in COUNTERS.items()}
        self._seconds = Histogram(HISTOGRAM, "Training time of ended trials", _DURATIONS, ("sweep", "state"))
        self._due_at = 0.0

    def handle(self, events: list[Event]) -> None:
        """Apply events in order. A continued sweep first passes the events of its journal."""
        is_resumed = not self._state.trials and any(isinstance(event, Started) for event in events)
        for event in events:
            self._count(event)
        if is_resumed:
            self._state.restart()

    def _count(self, event: Event) -> None:
        self._state.apply(event)
        match event:
            case Evaluated():
                self._counters["orpo_ray_evaluations"].inc(1.0, self._label)
                value = event.metrics.get(self._metric)
                if value is not None and math.isfinite(value):
                    self._best = value if self._best is None else self._better(self._best, value)
            case Forked():
                self._counters["orpo_ray_forks"].inc(1.0, self._label)
            case Retried():
                self._counters["orpo_ray_retries"].inc(1.0, self._label)
            case Finished():
                self._due_at = 0.0  # refresh at once: after the last trial there may be no later refresh
                self._seconds.observe(event.train_seconds, {**self._label, "state": event.status.value})

    @property
    def is_due(self) -> bool:
        """Whether it is time for `refresh`."""
        return time.monotonic() >= self._due_at

    def refresh(self, busy: int, idle: int, queued: int, backlog: int) -> None:
        """Set every gauge.

        Args:
            busy: worker groups that train.
            idle: worker groups without a trial.
            queued: trials that wait for a worker group.
            backlog: events that MLflow has not taken yet.
        """
        self._due_at = time.monotonic() + REFRESH_S
        states = Tally(trial.status for trial in self._state.trials.values())
        for state in STATES:
            self._set("orpo_ray_trials", states[state], state=state.value)
        self._set("orpo_ray_worker_groups", busy, state="busy")
        self._set("orpo_ray_worker_groups", idle, state="idle")
        self._set("orpo_ray_trials_queued", queued)
        self._set("orpo_ray_mlflow_backlog", backlog)
        if self._best is not None:
            self._set("orpo_ray_best", self._best, metric=self._metric)
        for trial in self._state.trials.values():
            if trial.status is Status.TRAINING:
                self._set_trial(trial)

    def _set_trial(self, trial: TrialState) -> None:
        self._set("orpo_ray_trial_step", trial.step, trial=trial.trial_id)
        self._set("orpo_ray_trial_max_steps", trial.max_steps or 0, trial=trial.trial_id)
        for name, (gauge, factor) in _TRIAL_METRICS.items():
            if (value := trial.logged.get(name)) is not None:
                self._set(gauge, factor * value, trial=trial.trial_id)
        if (value := trial.value(self._metric)) is not None:
            self._set("orpo_ray_trial_metric", value, trial=trial.trial_id, metric=self._metric)

    def _set(self, gauge: str, value: float, **labels: str) -> None:
        if math.isfinite(value):  # a gauge cannot show a non-finite loss
            self._gauges[gauge].set(value, {**self._label, **labels})
