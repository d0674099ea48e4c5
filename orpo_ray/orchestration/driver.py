"""Tune's side of a trial: a light actor that relays between Tune and the broker. Imports no torch."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import ray
from ray import tune

from orpo_ray.config import ExperimentConfig
from orpo_ray.config.space import plain
from orpo_ray.orchestration.broker_address import BrokerAddress
from orpo_ray.storage.events import Status

WORST = 1.0e6
"""Magnitude of the metric reported to Tune for a diverged or failed trial, signed so that it is worst: NaN would not
compare as worse."""


class TrialDriver(tune.Trainable):
    """Submits a trial to the broker and forwards its evaluations to Tune."""

    def setup(
        self,
        config: dict[str, Any],
        experiment: ExperimentConfig,
        resource_classes: dict[str, str],
        confirmations: str,
        broker: BrokerAddress,
    ) -> None:
        """Called once per actor; actors are reused for later trials.

        Args:
            config: the first trial's params: axis name -> value.
            experiment: the sweep.
            resource_classes: bundle label -> resource class.
            confirmations: prefix of the ids of confirmation trials.
            broker: where the broker is found.
        """
        self._experiment, self._resource_classes, self._confirmations = experiment, resource_classes, confirmations
        self._broker = broker.connect()
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Switch to another trial, or to one that was paused.

        The trial is submitted at the first step: Tune also creates drivers that it drops before they are used.
        """
        self._params = plain(new_config)
        self._name = uuid.uuid4().hex
        self._is_submitted = False
        self._last: dict[str, Any] = {"step": 0, "metrics": {}}
        sweep = self._experiment.sweep
        assert sweep is not None
        self._metric, self._worst = sweep.metric, -WORST if sweep.mode == "max" else WORST
        self._eval_every = self._experiment.train.eval_every or 1
        self._bundle = sweep.bundle_of(self._params)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the trial's next evaluation or its end, and return it.

        `step` is the trial's optimizer step: unlike Tune's own counter it does not restart after a retry. The metric is
        in every result, as Tune requires; `report` is the broker's report as JSON.
        """
        if not self._is_submitted:
            self._submit()
        report = ray.get(self._broker.next_result.remote(self.trial_id, self._name))
        self._last = {"step": report["step"], "metrics": report["metrics"] or self._last["metrics"]}
        lost = report["status"] in (Status.DIVERGED, Status.FAILED)
        value = self._worst if lost else self._last["metrics"].get(self._metric, self._worst)
        step = max(report["step"], 1)
        return {
            "step": step,
            "evaluation": -(-step // self._eval_every),
            self._metric: value,
            "report": json.dumps(report),  # text: Tune would flatten a mapping, and split its keys at slashes
            "done": report["status"] is not None,
        }

    def _submit(self) -> None:
        resource_class, config = self._resource_classes[self._bundle], self._experiment.trial(self._params)
        purpose = "confirm" if self.trial_id.startswith(self._confirmations) else "search"
        submission = self._broker.submit.remote(
            self.trial_id, self._params, self._bundle, resource_class, config, purpose
        )
        ray.get(submission)
        self._is_submitted = True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write a note of the step; the state itself is in the trial's folder, written by its workers."""
        note = {"trial_id": self.trial_id, "step": self._last["step"]}
        (Path(checkpoint_dir) / "state.json").write_text(json.dumps(note), encoding="utf-8")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Do nothing: workers resume from the newest checkpoint in the trial's folder, where a fork puts its copy."""


class StopAtBroker(tune.Callback):
    """Tells the broker of every trial that Tune has ended, because the worker of a stopped driver waits for that."""

    def __init__(self, broker: BrokerAddress) -> None:
        """Take the address rather than a handle, which Tune could not pickle."""
        self._broker = broker

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial ended by itself or was stopped; the broker knows which."""
        self._broker.connect().stop.remote(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The driver failed; its trial must not keep training without it."""
        self.on_trial_complete(iteration, trials, trial)
