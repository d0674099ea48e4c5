"""MLflow child runs: one per trial, written from the trial's events."""

from __future__ import annotations

import json
import logging
import re
import threading
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import (
    MLFLOW_LOGGED_ARTIFACTS,
    MLFLOW_MODEL_IS_EXTERNAL,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NOTE,
)

from orpo_ray.config import ExperimentConfig
from orpo_ray.config.flatten import as_text, trial_params
from orpo_ray.config.space import describe
from orpo_ray.provenance import without_password
from orpo_ray.storage import generations
from orpo_ray.storage.events import (
    Evaluated,
    Event,
    Finished,
    Forked,
    Logged,
    Purpose,
    Retried,
    Started,
    Status,
    Submitted,
)
from orpo_ray.tracking import notes
from orpo_ray.tracking.delivery import is_temporary
from orpo_ray.tracking.parent_run import ParentRun
from orpo_ray.tracking.read_runs import search_all_runs
from orpo_ray.tracking.run_values import (
    GENERATIONS_ARTIFACT,
    ChildRun,
    dataset_inputs,
    end_tags,
    final_metrics,
    known_child,
    metric_points,
    origin_tags,
    run_address,
    tag_text,
    worker_params,
)

log = logging.getLogger(__name__)

_TERMINAL = {
    Status.FINISHED: "FINISHED",
    Status.STOPPED_EARLY: "KILLED",
    Status.DIVERGED: "FAILED",
    Status.FAILED: "FAILED",
}
"""Status of a trial -> status of its MLflow run."""


@dataclass(slots=True)
class _Trial:
    """Values from a trial's events that its note needs."""

    params: dict[str, Any]
    purpose: Purpose
    is_forked: bool = False


class ChildRuns:
    """Writes the trials' runs. Different threads may deliver different trials at the same time."""

    def __init__(
        self, client: MlflowClient, config: ExperimentConfig, provenance: dict[str, Any], parent: ParentRun
    ) -> None:
        """Find the trials that MLflow has already.

        Raises:
            MlflowException: the server does not answer or refuses.
        """
        self._client, self._config, self._provenance, self._parent = client, config, provenance, parent
        self.run_ids: dict[str, str] = {}
        """Trial id -> MLflow run id, for trials delivered so far."""
        self._trials: dict[str, _Trial] = {}
        self._children: dict[str, ChildRun] = {}
        self._in_doubt: set[str] = set()
        """Trials with a request that may have arrived although its answer was lost."""
        self._parent_digests: set[str] = set()
        """Digests of the data sets that the parent run lists."""
        self._inputs_lock = threading.Lock()  # held during requests; only delivery threads wait for it
        self.find()

    def doubt(self, trial_id: str) -> None:
        """Look the trial's run up again before the next delivery, because a request's answer was lost."""
        self._in_doubt.add(trial_id)

    def end_unfinished(self, status: str, at: int) -> None:
        """End the runs of unfinished trials; they are reopened if the sweep continues.

        Args:
            status: of an MLflow run, `KILLED` or `FAILED`.
            at: time of the end, in milliseconds since 1970.
        """
        for child in self._children.values():
            if not child.is_done:
                self._client.set_terminated(child.run_id, status, end_time=at)
                child.is_open = False

    def find(self, trial_id: str | None = None) -> None:
        """Find which trials of the sweep (or whether this one) MLflow has, and how far each was delivered."""
        children: dict[str, ChildRun] = {}
        wanted = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self._parent.run_id}'"
        if trial_id is not None:
            wanted += f" and tags.`orpo_ray.trial_id` = '{trial_id}'"
        for run in search_all_runs(self._client, [self._parent.experiment_id], wanted):
            children[run.data.tags["orpo_ray.trial_id"]] = known_child(run)
        self.run_ids.update({trial_id: child.run_id for trial_id, child in children.items()})
        self._children |= children

    def deliver(self, trial_id: str, events: list[Event]) -> None:
        """Write events of one trial into its run, in order.

        Raises:
            MlflowException: the server does not answer or refuses.
        """
        if trial_id in self._in_doubt:
            self._children.pop(trial_id, None)
            self.find(trial_id)
            self._in_doubt.discard(trial_id)
        if isinstance(first := events[0], Submitted):
            self._trials[trial_id] = _Trial(first.params, first.purpose)
        if trial_id not in self._trials:
            raise ValueError(f"event {first.kind!r} of trial {trial_id} comes before its submission")
        trial = self._trials[trial_id]
        child = self._children.get(trial_id)
        if child is None:
            child = self._children[trial_id] = self._create_child(trial_id, first.time, trial)
        end = next((event for event in events if isinstance(event, Finished)), None)
        if not child.is_done:
            self._deliver_events(trial_id, trial, child, events)
            if end is not None:
                self._client.set_terminated(child.run_id, _TERMINAL[end.status], end_time=end.time)
                child.is_done, child.is_open = True, False
        if end is not None and not child.has_generations:
            # After the end: where artifacts cannot be stored, the run is at least complete.
            self._log_generations(trial_id, child)

    def _deliver_events(self, trial_id: str, trial: _Trial, child: ChildRun, events: list[Event]) -> None:
        if not child.is_open:
            self._client.update_run(child.run_id, status="RUNNING")
            child.is_open = True
        metrics: list[Metric] = []
        params: dict[str, Any] = {}
        tags: dict[str, str] = {}
        reached = dict(child.watermark)
        for event in events:
            match event:
                case Submitted():
                    params |= trial_params(self._config, event.params)
                    tags["orpo_ray.purpose"] = trial.purpose
                    tags[MLFLOW_RUN_NOTE] = self._note(trial_id, trial)
                case Started():
                    params |= worker_params(event.facts)
                    if "forward/fallback" in event.facts:
                        tags["orpo_ray.fallback"] = event.facts["forward/fallback"]
                    self._log_inputs(child, event.facts)
                case Logged() | Evaluated():
                    # Points at the watermark go again: their batch may have been split. MLflow drops equal points.
                    if event.step >= reached.get(event.kind, 0):
                        metrics += metric_points(event.metrics, event.time, event.step)
                        reached[event.kind] = event.step
                case Retried():
                    tags |= {"orpo_ray.retries": str(event.attempt), "orpo_ray.last_retry": event.error}
                case Forked():
                    # Parameters cannot change in MLflow; the axes' values over time are metrics.
                    axes: dict[str, float | None] = {
                        f"axes/{name}": v for name, v in event.params.items() if isinstance(v, int | float)
                    }
                    metrics += metric_points(axes, event.time, event.step)
                    tags["orpo_ray.last_fork"] = f"of trial {event.donor} at step {event.step}"
                    trial.params, trial.is_forked = event.params, True
                case Finished():
                    # Step 0: a bar in the UI, not a line.
                    model_id = self._model_of(trial_id, trial, child, event)
                    final = final_metrics(event.metrics, event.steps, event.train_seconds)
                    metrics += metric_points(final, event.time, step=0, model_id=model_id)
                    tags |= end_tags(event) | {MLFLOW_RUN_NOTE: self._note(trial_id, trial, event)}
        self._client.log_batch(
            child.run_id,
            metrics=metrics,
            params=[Param(k, as_text(v)) for k, v in params.items() if k not in child.logged_params],
            tags=[RunTag(k, tag_text(v)) for k, v in tags.items()],
            synchronous=True,
        )
        child.watermark = reached
        child.logged_params |= params.keys()

    def _create_child(self, trial_id: str, time_ms: int, trial: _Trial) -> ChildRun:
        run = self._client.create_run(
            self._parent.experiment_id,
            start_time=time_ms,
            tags=origin_tags(self._provenance)
            | {MLFLOW_PARENT_RUN_ID: self._parent.run_id, "orpo_ray.trial_id": trial_id},
            run_name=describe(trial.params) if trial.params else self._config.name,
        )
        self.run_ids[trial_id] = run.info.run_id
        return ChildRun(run.info.run_id)

    def _note(self, trial_id: str, trial: _Trial, end: Finished | None = None) -> str:
        command = notes.trial_command(self._config, trial_id, trial.params, self._provenance["command"])
        return notes.trial_note(
            self._config,
            trial_id,
            trial.params,
            parent=run_address(self._parent.experiment_id, self._parent.run_id),
            command=None if trial.is_forked else without_password(command),
            purpose=trial.purpose,
            end=end,
        )

    def _log_inputs(self, child: ChildRun, facts: dict[str, Any]) -> None:
        """Log the training and held-out data, which only the worker knows, with the trial's and the parent run."""
        if child.has_inputs or "data/train_digest" not in facts:
            return
        datasets = dataset_inputs(self._config.data, facts)
        with self._inputs_lock:  # else two threads could create the same data set, and one request would be refused
            try:
                self._client.log_inputs(child.run_id, datasets=datasets)
                digests = {data.dataset.digest for data in datasets}
                if not digests <= self._parent_digests:  # bundles with different tokenizers have different digests
                    self._client.log_inputs(self._parent.run_id, datasets=datasets)
                    self._parent_digests |= digests
            except MlflowException as error:
                _log_refusal(error, "the data sets of a trial")
        child.has_inputs = True

    def _model_of(self, trial_id: str, trial: _Trial, child: ChildRun, end: Finished) -> str | None:
        """Id of the MLflow model that refers to the trial's checkpoint; the files stay where they are."""
        if end.status is not Status.FINISHED or end.checkpoint is None:
            return None
        try:
            return self._get_or_create_model(trial_id, trial, child, end.checkpoint)
        except MlflowException as error:  # servers before MLflow 3 have no logged models
            _log_refusal(error, f"the model of trial {trial_id}")
            return None

    def _get_or_create_model(self, trial_id: str, trial: _Trial, child: ChildRun, checkpoint: str) -> str:
        if child.was_found:
            for model in self._client.search_logged_models(
                [self._parent.experiment_id], filter_string=f"source_run_id = '{child.run_id}'", max_results=1
            ):
                return str(model.model_id)
        model = self._client.create_logged_model(
            self._parent.experiment_id,
            name=re.sub(r"[/:.%\"']", "-", f"{self._config.name}-{trial_id}"),
            source_run_id=child.run_id,
            tags={MLFLOW_MODEL_IS_EXTERNAL: "true", "orpo_ray.checkpoint": checkpoint},
            params={name: as_text(value) for name, value in self._config.settings(trial.params).items()},
            model_type="checkpoint",
        )
        self._client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _log_generations(self, trial_id: str, child: ChildRun) -> None:
        """Log the trial's generated answers at each evaluation as a table for MLflow's UI.

        `client.log_table` would append to an existing table and so duplicate it after a restart.
        """
        rows = generations.read(self._config.run_dir / "trials" / trial_id)
        if rows:
            table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
            self._client.log_text(child.run_id, json.dumps(table, ensure_ascii=False), GENERATIONS_ARTIFACT)
            tag = json.dumps([{"path": GENERATIONS_ARTIFACT, "type": "table"}])
            self._client.set_tag(child.run_id, MLFLOW_LOGGED_ARTIFACTS, tag)
        child.has_generations = True


def _log_refusal(error: MlflowException, what: str) -> None:
    """Log a refused request for optional content, so that the trial's metrics are still delivered.

    Raises:
        MlflowException: the error is temporary, so the delivery should be retried.
    """
    if is_temporary(error):
        raise error
    log.warning("MLflow refused %s: %s", what, without_password(str(error)))
