"""Early stopping within each bundle, by Tune's own schedulers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orpo_ray.config import AshaConfig, MedianConfig, SweepConfig
from orpo_ray.results import read_events
from orpo_ray.space import params_of


class PerBundle(FIFOScheduler):
    """An early-stopping scheduler of its own for every bundle: models of different size are never compared.

    Tune does not restore schedulers (ray-project/ray#30838), so this one learns again from the journal what the
    trials before a restart had reported.
    """

    def __init__(self, sweep: SweepConfig, max_steps: int | None, journal: Path) -> None:
        """Pickled by Tune at the start of the sweep, in this state.

        Args:
            sweep: which scheduler, and the metric.
            max_steps: length of a trial in optimizer steps, where it is known.
            journal: events of the sweep so far.
        """
        super().__init__()
        self._sweep = sweep
        self._max_steps = max_steps
        self._journal = journal
        self._schedulers: dict[str, TrialScheduler] = {}
        self._live: set[str] = set()
        self._earlier: dict[str, list[dict[str, Any]]] | None = None

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Metric and mode are the sweep's."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Also called for each trial of a restored sweep."""
        scheduler = self._of(trial)
        scheduler.on_trial_add(tune_controller, trial)
        self._live.add(trial.trial_id)
        # The median rule may not be asked again about a trial that it would stop; this method of it only takes note.
        median = isinstance(scheduler, MedianStoppingRule)
        take_note = scheduler.on_trial_complete if median else scheduler.on_trial_result
        for result in self._reported_earlier().pop(trial.trial_id, []):
            take_note(tune_controller, trial, result)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Continue or stop."""
        return str(self._of(trial).on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The trial has ended by itself."""
        if trial.trial_id in self._live:
            self._live.discard(trial.trial_id)
            self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """The trial was ended from outside."""
        if trial.trial_id in self._live:
            self._live.discard(trial.trial_id)
            self._of(trial).on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """The trial failed."""
        self.on_trial_remove(tune_controller, trial)

    def _of(self, trial: Any) -> TrialScheduler:
        label = self._sweep.bundle_of(params_of(trial.config))
        if label not in self._schedulers:
            self._schedulers[label] = self._build()
        return self._schedulers[label]

    def _build(self) -> TrialScheduler:
        scheduler, metric, mode = self._sweep.scheduler, self._sweep.metric, self._sweep.mode
        match scheduler:
            case AshaConfig():
                return AsyncHyperBandScheduler(
                    time_attr="step",
                    metric=metric,
                    mode=mode,
                    max_t=self._max_steps or 10**9,
                    grace_period=scheduler.grace_steps,
                    reduction_factor=scheduler.reduction_factor,
                    stop_last_trials=False,
                )
            case MedianConfig():
                return MedianStoppingRule(
                    time_attr="step",
                    metric=metric,
                    mode=mode,
                    grace_period=scheduler.grace_steps,
                    min_samples_required=scheduler.min_trials,
                )
            case _:
                return FIFOScheduler()

    def _reported_earlier(self) -> dict[str, list[dict[str, Any]]]:
        if self._earlier is None:
            self._earlier = {}
            for event in read_events(self._journal):
                if event["event"] == "eval" and self._sweep.metric in event["metrics"]:
                    result = {"step": event["step"], self._sweep.metric: event["metrics"][self._sweep.metric]}
                    self._earlier.setdefault(event["trial_id"], []).append(result)
        return self._earlier
