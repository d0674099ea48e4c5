"""The MLflow parent run of a sweep, and its experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import (
    MLFLOW_EXPERIMENT_PRIMARY_METRIC_GREATER_IS_BETTER,
    MLFLOW_EXPERIMENT_PRIMARY_METRIC_NAME,
    MLFLOW_RUN_NOTE,
)

from orpo_ray.config import METRIC_MODES, ExperimentConfig
from orpo_ray.config.flatten import as_text, parent_params
from orpo_ray.provenance import without_password
from orpo_ray.storage.events import Status
from orpo_ray.tracking import notes
from orpo_ray.tracking.run_values import (
    final_metrics,
    final_name,
    latest_points,
    metric_points,
    origin_tags,
    run_address,
    tag_text,
)
from orpo_ray.tracking.uri import TrackingError

_KIND_OF_EXPERIMENT = "mlflow.experimentKind"  # without it the UI assumes an experiment with prompts and traces


class ParentRun:
    """The run of a whole sweep, found again by the sweep's id."""

    def __init__(
        self, client: MlflowClient, uri: str, config: ExperimentConfig, sweep_id: str, provenance: dict[str, Any]
    ) -> None:
        """Find or create the experiment and the run.

        Raises:
            MlflowException: the server does not answer or refuses.
            TrackingError: the experiment was deleted.
        """
        self._client, self._uri, self._config = client, uri, config
        self._sweep_id, self._provenance = sweep_id, provenance
        self.next_system_step = 1  # charts in the UI begin at 1
        self.experiment_id = self._get_or_create_experiment()
        self.run_id = self._get_or_create_parent()

    def log_system(self, metrics: dict[str, float], time_ms: int, step: int) -> None:
        """Log one sample of all nodes' system metrics."""
        self._client.log_batch(self.run_id, metrics=metric_points(metrics, time_ms, step), synchronous=True)

    def attach(self, path: Path) -> None:
        """Store a file as an artifact, in the same folder as in the run directory."""
        path, home = path.absolute(), self._config.run_dir
        folder = path.parent.relative_to(home).as_posix() if path.is_relative_to(home) else "."
        self._client.log_artifact(self.run_id, str(path), None if folder == "." else folder)

    def end(self, results: dict[str, Any], interrupted: bool, run_ids: Mapping[str, str], at: int) -> None:
        """End the run with the sweep's results.

        Args:
            results: from `results.summarize`.
            interrupted: the sweep was stopped from outside before its end.
            run_ids: trial id -> run id of its child run.
            at: time of the end, in milliseconds since 1970.
        """
        links = {trial_id: run_address(self.experiment_id, run_id) for trial_id, run_id in run_ids.items()}
        tags = {MLFLOW_RUN_NOTE: notes.sweep_answer(self._config, results, links, interrupted=interrupted)}
        metrics: list[Metric] = []
        if best := results["best"]:
            metrics = metric_points(final_metrics(best["metrics"], best["steps"], best["train_seconds"]), at, step=0)
            tags |= {f"best.{name}": as_text(value) for name, value in best["params"].items()}
            if best["trial_id"] in run_ids:
                tags["best_run_id"] = run_ids[best["trial_id"]]
        self._client.log_batch(
            self.run_id,
            metrics=metrics,
            tags=[RunTag(key, tag_text(value)) for key, value in tags.items()],
            synchronous=True,
        )
        finished = any(trial["status"] == Status.FINISHED for trial in results["trials"])
        status = "KILLED" if interrupted else "FINISHED" if finished else "FAILED"
        self._client.set_terminated(self.run_id, status, end_time=at)

    def _get_or_create_experiment(self) -> str:
        name = self._config.tracking.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            is_server = self._uri.startswith(("http://", "https://", "databricks"))
            artifacts = None if is_server else (self._config.run_dir.parent / "mlartifacts").as_uri()
            try:
                self._client.create_experiment(name, artifact_location=artifacts)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise  # otherwise another process created it first
            experiment = self._client.get_experiment_by_name(name)
        if experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"MLflow experiment {name!r} was deleted: `mlflow experiments restore -x {experiment.experiment_id}`, "
                "or choose another tracking.experiment"
            )
        experiment_id = str(experiment.experiment_id)
        if self._config.sweep is not None:
            # The UI draws this metric first. With several sweeps in the experiment, the last one sets it.
            metric = self._config.sweep.metric
            tags = {
                MLFLOW_EXPERIMENT_PRIMARY_METRIC_NAME: final_name(metric),
                MLFLOW_EXPERIMENT_PRIMARY_METRIC_GREATER_IS_BETTER: str(METRIC_MODES[metric] == "max"),
            }
            if _KIND_OF_EXPERIMENT not in experiment.tags:  # keep the user's choice
                tags[_KIND_OF_EXPERIMENT] = "custom_model_development"
            for key, value in tags.items():
                if experiment.tags.get(key) != value:
                    self._client.set_experiment_tag(experiment_id, key, value)
        return experiment_id

    def _get_or_create_parent(self) -> str:
        found = self._client.search_runs(
            [self.experiment_id], filter_string=f"tags.`orpo_ray.sweep_id` = '{self._sweep_id}'", max_results=1
        )
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            steps = [m.step for m in latest_points(found[0]) if m.key.startswith("system/")]
            self.next_system_step = max(steps, default=0) + 1
            return self._describe_parent(found[0], f"resumed/{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}/")
        tags = origin_tags(self._provenance) | {
            "orpo_ray.sweep_id": self._sweep_id,
            MLFLOW_RUN_NOTE: notes.sweep_note(self._config),
        }
        run = self._client.create_run(self.experiment_id, tags=tags, run_name=self._config.name)
        return self._describe_parent(run, folder="")

    def _describe_parent(self, run: Run, folder: str) -> str:
        """Log parameters and artifacts; return the run id. A resumed sweep gets its own `folder`: code may differ."""
        run_id: str = run.info.run_id
        params = {k: v for k, v in parent_params(self._config).items() if k not in run.data.params}
        self._client.log_batch(run_id, params=[Param(k, v) for k, v in params.items()], synchronous=True)
        git = dict(self._provenance["git"] or {})
        texts = {
            "config.yaml": yaml.safe_dump(self._config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
            "git.diff": git.pop("diff", ""),
            "provenance.json": json.dumps(self._provenance | {"git": git or None}, indent=2),
        }
        for name, text in texts.items():
            if text:
                self._client.log_text(run_id, without_password(text), folder + name)
        return run_id
