"""Population-based schedulers: Tune's synchronous PBT and PB2, adapted to paused trials."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining

from orpo_ray.config import Pb2Config, PbtConfig, SweepConfig
from orpo_ray.config.space import Choice, LogUniform, Uniform
from orpo_ray.search.rules import PruningRule
from orpo_ray.storage.sweep_state import TrialState


class _Population:
    """Shared part of both schedulers: an exploit copies the donor's checkpoint, and a restart restores their state."""

    _exploited: Callable[[Trial, Trial], None]
    _population: dict[str, TrialState]

    def _exploit(self, controller: Any, trial: Trial, donor: Trial) -> None:
        super()._exploit(controller, trial, donor)  # type: ignore[misc]
        self._exploited(trial, donor)

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        super().on_trial_add(controller, trial)  # type: ignore[misc]
        self._remember(trial)

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        """A paused trial that has not reached the next exchange.

        Tune advances the exchange when the last trial reaches it. If that trial has ended, it is advanced here.
        """
        live = controller.get_live_trials()
        if live and all(t.status == Trial.PAUSED for t in live):
            behind = min(self._trial_state[t].last_train_time for t in live)  # type: ignore[attr-defined]
            while behind >= self._next_perturbation_sync:
                self._next_perturbation_sync += self._perturbation_interval  # type: ignore[attr-defined]
        chosen: Trial | None = super().choose_trial_to_run(controller)  # type: ignore[misc]
        return chosen

    def _remember(self, trial: Trial) -> None:
        """Restore Tune's state of a trial when a sweep is continued."""
        past = self._population.get(trial.trial_id)
        interval = self._perturbation_interval  # type: ignore[attr-defined]
        alive = [t.evaluated_step for t in self._population.values() if not t.status.has_ended]
        if alive:
            self._next_perturbation_sync = (min(alive) // interval + 1) * interval
        if past is None or (value := past.value(self._metric)) is None:  # type: ignore[attr-defined]
            return
        state = self._trial_state[trial]  # type: ignore[attr-defined]
        state.last_score = self._metric_op * value  # type: ignore[attr-defined]
        state.last_train_time = past.evaluated_step
        state.last_perturbation_time = past.evaluated_step // interval * interval


class Pbt(_Population, PopulationBasedTraining):
    """Tune's synchronous PBT."""

    def __init__(
        self,
        scheduler: PbtConfig,
        sweep: SweepConfig,
        exploited: Callable[[Trial, Trial], None],
        population: dict[str, TrialState],
    ) -> None:
        from ray import tune

        random.seed(sweep.seed)  # Tune draws from the global generators
        np.random.seed(sweep.seed)
        ranges = {n: axis for n, axis in sweep.space.items() if isinstance(axis, Uniform | LogUniform)}
        mutations: dict[str, Any] = {
            name: (tune.loguniform if isinstance(axis, LogUniform) else tune.uniform)(axis.low, axis.high)
            for name, axis in ranges.items()
        }
        mutations |= {n: list(axis.values) for n, axis in sweep.space.items() if isinstance(axis, Choice)}

        def within(config: dict[str, Any]) -> dict[str, Any]:
            """Clip values, because a perturbation factor may leave an axis's range."""
            return config | {n: min(max(config[n], a.low), a.high) for n, a in ranges.items()}

        super().__init__(
            time_attr="step",
            metric=sweep.metric,
            mode=sweep.mode,
            perturbation_interval=scheduler.interval_steps,
            hyperparam_mutations=mutations,
            quantile_fraction=scheduler.quantile,
            resample_probability=scheduler.resample_probability,
            custom_explore_fn=within,
            log_config=False,
            synch=True,
        )
        self._exploited, self._population = exploited, population


@dataclass(frozen=True, slots=True)
class _PB2Trial:
    """Stand-in for a trial, with log axes as logarithms, as PB2 sees it."""

    name: str
    config: dict[str, Any]

    def __str__(self) -> str:
        return self.name


def _log_scaled(config: dict[str, Any], axes: dict[str, Uniform | LogUniform]) -> dict[str, Any]:
    return config | {n: math.log(config[n]) for n, axis in axes.items() if isinstance(axis, LogUniform) and n in config}


def _drawn(axis: Uniform | LogUniform) -> float:
    if isinstance(axis, LogUniform):
        return math.exp(random.uniform(math.log(axis.low), math.log(axis.high)))
    return random.uniform(axis.low, axis.high)


def pb2(
    scheduler: Pb2Config,
    sweep: SweepConfig,
    exploited: Callable[[Trial, Trial], None],
    population: dict[str, TrialState],
) -> PruningRule:
    """Tune's synchronous PB2. Its libraries are imported only here."""
    from ray.tune.schedulers.pb2 import PB2

    axes = {n: axis for n, axis in sweep.space.items() if isinstance(axis, Uniform | LogUniform)}

    class Pb2(_Population, PB2):
        """PB2 models the gain of an evaluation over the one before, so it gets all of them; log axes as logarithms."""

        def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
            state, step = self._trial_state[trial], result["step"]
            if step - state.last_perturbation_time < self._perturbation_interval:
                self._save_trial_state(state, step, result, trial)  # PB2 itself saves only those at exchanges
            return str(super().on_trial_result(controller, trial, result))

        def _save_trial_state(self, state: Any, time: int, result: dict[str, Any], trial: Trial) -> None:
            super()._save_trial_state(state, time, result, _PB2Trial(str(trial), _log_scaled(trial.config, axes)))

        def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
            donor = _PB2Trial(str(trial_to_clone), _log_scaled(trial_to_clone.config, axes))
            shown, operations = super()._get_new_config(trial, donor)
            if all(shown[name] == donor.config[name] for name in axes):
                # Without a known gain of the donor, PB2 would run the donor's settings twice.
                return trial_to_clone.config | {name: _drawn(axis) for name, axis in axes.items()}, operations
            return trial_to_clone.config | {
                name: min(
                    max(math.exp(shown[name]) if isinstance(axis, LogUniform) else shown[name], axis.low), axis.high
                )
                for name, axis in axes.items()
            }, operations

    random.seed(sweep.seed)
    np.random.seed(sweep.seed)
    rule = Pb2(
        time_attr="step",
        metric=sweep.metric,
        mode=sweep.mode,
        perturbation_interval=scheduler.interval_steps,
        hyperparam_bounds={n: [_log_scaled({n: end}, axes)[n] for end in (a.low, a.high)] for n, a in axes.items()},
        quantile_fraction=scheduler.quantile,
        log_config=False,
        synch=True,
    )
    rule._exploited, rule._population = exploited, population
    return rule
