"""Tune's side of a trial: a light actor that forwards between Tune and the broker. Imports no torch."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import ray
from ray import tune

from orpo_ray.config import ExperimentConfig
from orpo_ray.config.space import plain

WORST = 1.0e6
"""Told to Tune for a diverged or failed trial, with the sign that makes it worst: NaN never compares as worse."""


class TrialDriver(tune.Trainable):
    """Hands a trial's config to the broker and forwards what comes back."""

    def setup(
        self,
        config: dict[str, Any],
        experiment: ExperimentConfig,
        resource_classes: dict[str, str],
        confirmations: str,
        broker_name: str,
        namespace: str,
    ) -> None:
        """Called once per actor; actors are reused for later trials.

        Args:
            config: the first trial's params: axis name -> value.
            experiment: the sweep.
            resource_classes: bundle -> resource_class.
            confirmations: how the ids of confirmation trials begin.
            broker_name: the broker's name.
            namespace: and namespace.
        """
        self._experiment, self._resource_classes, self._confirmations = experiment, resource_classes, confirmations
        self._broker = ray.get_actor(broker_name, namespace=namespace)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take on another trial, or one that was paused.

        It is handed over at the first step: Tune also makes drivers that it drops again before they were of use.
        """
        self._params = plain(new_config)
        self._name = uuid.uuid4().hex
        self._is_handed_over = False
        self._last: dict[str, Any] = {"step": 0, "metrics": {}}
        sweep = self._experiment.sweep
        assert sweep is not None
        self._metric, self._worst = sweep.metric, -WORST if sweep.mode == "max" else WORST
        self._eval_every = self._experiment.train.eval_every or 1
        self._bundle = sweep.bundle_of(self._params)
        return True

    def step(self) -> dict[str, Any]:
        """The next evaluation, or the end.

        `step` is the trial's optimizer step: unlike Tune's own counter it does not restart after a retry. The metric is
        in every result, as Tune demands; `report` is the broker's own words.
        """
        if not self._is_handed_over:
            self._hand_over()
        report = ray.get(self._broker.next_result.remote(self.trial_id, self._name))
        self._last = {"step": report["step"], "metrics": report["metrics"] or self._last["metrics"]}
        lost = report["status"] in ("diverged", "failed")
        value = self._worst if lost else self._last["metrics"].get(self._metric, self._worst)
        step = max(report["step"], 1)
        return {
            "step": step,
            "evaluation": -(-step // self._eval_every),
            self._metric: value,
            "report": json.dumps(report),  # text: Tune would flatten a mapping, and split its keys at slashes
            "done": report["status"] is not None,
        }

    def _hand_over(self) -> None:
        resource_class, config = self._resource_classes[self._bundle], self._experiment.trial(self._params)
        purpose = "confirm" if self.trial_id.startswith(self._confirmations) else "search"
        submission = self._broker.submit.remote(
            self.trial_id, self._params, self._bundle, resource_class, config, purpose
        )
        ray.get(submission)
        self._is_handed_over = True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A note of which state Tune means: the state itself is in the trial's folder, written by its workers."""
        note = {"trial_id": self.trial_id, "step": self._last["step"]}
        (Path(checkpoint_dir) / "state.json").write_text(json.dumps(note), encoding="utf-8")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: workers start from the newest checkpoint in the trial's folder; a fork has put a donor's there."""


class StopAtBroker(tune.Callback):
    """Tells the broker of every trial that Tune has ended: a stopped driver's worker waits for that word."""

    def __init__(self, broker_name: str, namespace: str) -> None:
        """Names rather than a handle, which Tune could not pickle."""
        self._name, self._namespace = broker_name, namespace

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Ended by itself or stopped; the broker knows which."""
        ray.get_actor(self._name, namespace=self._namespace).stop.remote(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The driver failed; its trial must not run on alone."""
        self.on_trial_complete(iteration, trials, trial)
