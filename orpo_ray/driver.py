"""Tune's side of a trial: a light actor that forwards between Tune and the broker. Imports no torch."""

from __future__ import annotations

from typing import Any

import ray
from ray import tune

from orpo_ray.config import ExperimentConfig
from orpo_ray.space import params_of

WORST = 1.0e6
"""Told to Tune for a diverged or failed trial, with the sign that makes it worst: NaN never compares as worse."""


class TrialDriver(tune.Trainable):
    """Hands a trial's config to the broker and forwards what comes back."""

    def setup(
        self,
        config: dict[str, Any],
        experiment: ExperimentConfig,
        lanes: dict[str, str],
        broker_name: str,
        namespace: str,
    ) -> None:
        """Called once per actor; actors are reused for later trials.

        Args:
            config: the first trial, as `space.to_ray_tune` or `to_optuna` shapes it.
            experiment: the sweep.
            lanes: bundle -> lane.
            broker_name: the broker's name.
            namespace: and namespace.
        """
        self._experiment, self._lanes = experiment, lanes
        self._broker = ray.get_actor(broker_name, namespace=namespace)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take on another trial."""
        params = params_of(new_config)
        self._last: dict[str, float] = {}
        _, sweep = self._experiment.as_sweep()
        self._metric, self._worst = sweep.metric, -WORST if sweep.mode == "max" else WORST
        bundle = sweep.bundle_of(params)
        trial_config = self._experiment.trial(params)
        ray.get(self._broker.submit.remote(self.trial_id, params, bundle, self._lanes[bundle], trial_config))
        return True

    def step(self) -> dict[str, Any]:
        """The next evaluation, or the end.

        `step` is the trial's optimizer step: unlike Tune's own counter it does not restart after a retry. The metric is
        in every result, as Tune demands.
        """
        result = ray.get(self._broker.next_result.remote(self.trial_id))
        status = result["status"]
        self._last = result["metrics"] or self._last
        lost = status in ("diverged", "failed")
        value = self._worst if lost else self._last.get(self._metric, self._worst)
        return {"step": max(result["step"], 1), self._metric: value, "done": status is not None}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a trial's state is its own checkpoint and the journal."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, see `save_checkpoint`."""


class StopAtBroker(tune.Callback):
    """Tells the broker of every trial that Tune has ended: a stopped driver's worker waits for that word."""

    def __init__(self, broker_name: str, namespace: str) -> None:
        """Names rather than a handle: Tune pickles this, and a restored sweep has another broker of the same name."""
        self._name, self._namespace = broker_name, namespace

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Ended by itself or stopped; the broker knows which."""
        ray.get_actor(self._name, namespace=self._namespace).stop.remote(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The driver failed; its trial must not run on alone."""
        self.on_trial_complete(iteration, trials, trial)
