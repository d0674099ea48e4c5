"""Pruning rules of one bundle: fifo, median, HyperBand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ray.tune.experiment import Trial
from ray.tune.schedulers import HyperBandForBOHB, MedianStoppingRule
from ray.tune.schedulers import TrialScheduler as Decision

from orpo_ray.storage.events import Evaluated, Event


class PruningRule(Protocol):
    """Compares the search trials of one bundle."""

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        """A trial was proposed, or restored after a restart."""

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide on an evaluation before the last one: continue, pause or stop."""

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """A trial ended by itself, or was stopped while it trained."""

    def on_trial_remove(self, controller: Any, trial: Trial) -> None:
        """A trial was ended while it was paused."""

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        """A paused trial that should resume; None if there is none."""


class BundleView:
    """Tune's controller restricted to one bundle's trials, as its rule sees it."""

    def __init__(self, controller: Any, trials: Callable[[], list[Trial]]) -> None:
        self._controller, self._mine = controller, trials

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)

    def get_trials(self) -> list[Trial]:
        return self._mine()

    def get_live_trials(self) -> set[Trial]:
        return {trial for trial in self._mine() if not trial.is_finished()}


class Fifo:
    """Runs every trial to its end."""

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        pass

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        return str(Decision.CONTINUE)

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        pass

    def on_trial_remove(self, controller: Any, trial: Trial) -> None:
        pass

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        return None


class Median(Fifo):
    """Tune's median stopping rule, with reports from before a restart replayed."""

    def __init__(self, rule: MedianStoppingRule, metric: str, events: list[Event]) -> None:
        self._rule = rule
        self._earlier: dict[str, list[dict[str, Any]]] = {}
        for event in events:
            if isinstance(event, Evaluated) and metric in event.metrics:
                result = {"step": event.step, metric: event.metrics[metric]}
                self._earlier.setdefault(event.trial_id, []).append(result)

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        # `on_trial_result` might decide to stop the trial; `on_trial_complete` only records the result.
        for result in self._earlier.pop(trial.trial_id, []):
            self._rule.on_trial_complete(controller, trial, result)

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        return str(self._rule.on_trial_result(controller, trial, result))

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._rule.on_trial_complete(controller, trial, result)


class HyperBand(HyperBandForBOHB):
    """Tune's HyperBand. Partly filled brackets are halved only when the search has ended and no trial can run."""

    def choose_trial_to_run(self, tune_controller: Any, allow_recurse: bool = True) -> Trial | None:
        """A paused trial of a bracket that has been halved."""
        for band in self._hyperbands:
            for bracket in band:
                for trial in bracket.current_trials() if bracket is not None else ():
                    if trial.status == Trial.PAUSED and trial in bracket.trials_to_unpause:
                        return trial
        return None

    def halve_unfilled(self, controller: Any) -> None:
        """Halve all brackets, because no more trials will fill them."""
        for band in self._hyperbands:
            for bracket in band:
                if bracket is not None and bracket.current_trials():
                    self._process_bracket(controller, bracket)
