"""MLflow: one parent run per sweep, one child per trial, fed from the sweep's journal."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import (
    MLFLOW_EXPERIMENT_PRIMARY_METRIC_GREATER_IS_BETTER,
    MLFLOW_EXPERIMENT_PRIMARY_METRIC_NAME,
    MLFLOW_GIT_COMMIT,
    MLFLOW_LOGGED_ARTIFACTS,
    MLFLOW_MODEL_IS_EXTERNAL,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
)

from orpo_ray.config import METRIC_MODES, ExperimentConfig
from orpo_ray.config.flatten import as_text, parent_params, trial_params
from orpo_ray.config.space import describe
from orpo_ray.provenance import without_password
from orpo_ray.tracking import notes
from orpo_ray.tracking.delivery import Delivery, Unreachable, backoffs
from orpo_ray.tracking.run_values import (
    GENERATIONS_ARTIFACT,
    ChildRun,
    dataset_inputs,
    end_tags,
    final_metrics,
    final_name,
    known_child,
    latest_points,
    metric_points,
    tag_text,
    worker_params,
)
from orpo_ray.tracking.uri import TrackingError, bound_requests, resolve_uri

log = logging.getLogger(__name__)

_TERMINAL = {"finished": "FINISHED", "stopped_early": "KILLED", "diverged": "FAILED", "failed": "FAILED"}
"""Status of a trial -> status of its MLflow run."""


_SENDERS = 8
"""Requests to a server at a time, each of another run; a SQLite file gets one writer."""

_SYSTEM = "system metrics"
"""Key under which metrics of nodes are delivered: they belong to the parent run, and need not wait for its end."""

_KIND_OF_EXPERIMENT = "mlflow.experimentKind"  # else the UI takes it for one with prompts and traces


@dataclass(slots=True)
class _Trial:
    """What the journal says of a trial and its note needs."""

    params: dict[str, Any]
    purpose: str
    is_forked: bool = False


class SweepTracker:
    """Delivers a sweep's events to MLflow from threads of its own; a server that is away holds up nobody.

    A trial's events go out in order, in batches, several trials at a time where a server takes them. While the server
    cannot be reached they wait in memory, and the journal keeps them on disk: feed it again, whole, after a restart of
    the sweep. Nothing is written twice, since a point's step, time and value come from the event, and points below a
    run's last step are not sent at all.
    """

    def __init__(self, config: ExperimentConfig, sweep_id: str, provenance: dict[str, Any]) -> None:
        """Nothing is contacted before `start`.

        Args:
            config: the experiment, with its sweep if it has one.
            sweep_id: names the parent run; the same id finds it again.
            provenance: from `provenance.collect`.

        Raises:
            TrackingError: the tracking URI is a relative path.
        """
        self.uri = resolve_uri(config.tracking.uri, config.run_dir.parent)
        self.run_ids: dict[str, str] = {}
        """trial id -> MLflow run id, of the trials delivered so far; complete after `flush`."""
        self.parent_id = ""
        """Run id of the parent, after `start`."""
        self._config, self._sweep_id, self._provenance = config, sweep_id, provenance
        self._trials: dict[str, _Trial] = {}
        self._children: dict[str, ChildRun] = {}
        self._in_doubt: set[str] = set()
        """Trials of which a request may have arrived though its answer did not."""
        self._last_time = 0
        self._parent_digests: set[str] = set()
        """Data that the parent run lists."""
        self._next_system_step = 1  # a line in the UI begins at 1
        self._lock = threading.Lock()
        self._inputs_lock = threading.Lock()  # held during requests, which nobody but senders may wait for
        self._delivery = Delivery("MLflow", self._send, 1 if self.uri.startswith("sqlite") else _SENDERS)

    def start(self, timeout_s: float = 30.0) -> str:
        """Find or create the experiment and the sweep's parent run, and begin to deliver.

        Args:
            timeout_s: how long a server that does not answer is waited for.

        Returns:
            Run id of the parent.

        Raises:
            TrackingError: no answer in time, or the server refuses (experiment deleted, no permission).
        """
        bound_requests()
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # else two lines for every trial
        if self.uri.startswith("sqlite"):
            Path(self.uri.partition(":///")[2]).parent.mkdir(parents=True, exist_ok=True)
        give_up = time.monotonic() + timeout_s
        for wait in backoffs():
            try:
                self._client = MlflowClient(self.uri)
                self._experiment_id = self._get_or_create_experiment()
                self.parent_id = self._get_or_create_parent()
                self._children = self._find_children()
                break
            except (MlflowException, OSError) as error:
                refuses_us = isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403)
                if refuses_us or not _is_temporary(error) or time.monotonic() + wait > give_up:
                    remedy = (
                        "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a user who may write there"
                        if refuses_us
                        else "Start the server, correct tracking.uri (or MLFLOW_TRACKING_URI), or leave both unset for "
                        "a SQLite file in output_dir"
                    )
                    raise TrackingError(
                        f"MLflow at {without_password(self.uri)} cannot be used: {without_password(str(error))}\n"
                        f"{remedy}"
                    ) from error
                log.warning("MLflow does not answer yet: %s", without_password(str(error)))
                time.sleep(wait)
        self._delivery.start()
        return self.parent_id

    def handle(self, events: Iterable[dict[str, Any]]) -> None:
        """Queue events of the journal, in its order; returns at once. Events seen before do no harm."""
        events = list(events)
        with self._lock:
            self._last_time = max([self._last_time, *(event["time"] for event in events)])
        self._delivery.put((event["trial_id"], event) for event in events)

    def handle_system(self, metrics: dict[str, float]) -> None:
        """Queue a sample of all nodes for the parent run, as the next point of each of its lines; returns at once.

        Args:
            metrics: `system/node_<i>/<what>` -> value; see `system_metrics`.
        """
        with self._lock:
            step, self._next_system_step = self._next_system_step, self._next_system_step + 1
        event = {"metrics": metrics, "step": step, "time": int(time.time() * 1000)}
        self._delivery.put([(_SYSTEM, event)])

    def attach(self, paths: Iterable[Path]) -> None:
        """Queue files to be stored with the parent run; they are read when delivered, at the latest in `close`."""
        self._delivery.put((None, {"event": "attach", "path": str(path)}) for path in paths)

    def flush(self, timeout_s: float = 60.0) -> int:
        """Wait until everything queued is delivered, at most `timeout_s`; returns how many events were not."""
        return self._delivery.flush(timeout_s)

    def close(self, results: dict[str, Any], *, interrupted: bool = False, timeout_s: float = 60.0) -> int:
        """End the parent run and deliver what is left, waiting at most `timeout_s`.

        The parent ends FINISHED if a trial finished, else FAILED; KILLED if interrupted. Trials without an end are
        closed too, KILLED or FAILED, and are reopened if the sweep goes on later.

        Args:
            results: from `results.summarize`.
            interrupted: the sweep was stopped from outside before its end.

        Returns:
            How many events could not be delivered; 0 normally. They are in the journal: run the sweep again.
        """
        self._delivery.put([(None, {"event": "close", "results": results, "interrupted": interrupted})])
        undelivered = self._delivery.close(timeout_s)
        if undelivered:
            log.warning(
                "%d events did not reach MLflow at %s; they are in the journal: run the same command again to deliver",
                undelivered,
                without_password(self.uri),
            )
        return undelivered

    # Experiment and parent run

    def _get_or_create_experiment(self) -> str:
        name = self._config.tracking.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            is_server = self.uri.startswith(("http://", "https://", "databricks"))
            artifacts = None if is_server else (self._config.run_dir.parent / "mlartifacts").as_uri()
            try:
                self._client.create_experiment(name, artifact_location=artifacts)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise  # else another process was faster
            experiment = self._client.get_experiment_by_name(name)
        if experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"MLflow experiment {name!r} was deleted: `mlflow experiments restore -x {experiment.experiment_id}`, "
                "or choose another tracking.experiment"
            )
        experiment_id = str(experiment.experiment_id)
        if self._config.sweep is not None:
            # What the UI draws first. Of several sweeps in the experiment, the last one says.
            metric = self._config.sweep.metric
            tags = {
                MLFLOW_EXPERIMENT_PRIMARY_METRIC_NAME: final_name(metric),
                MLFLOW_EXPERIMENT_PRIMARY_METRIC_GREATER_IS_BETTER: str(METRIC_MODES[metric] == "max"),
            }
            if _KIND_OF_EXPERIMENT not in experiment.tags:  # what a user chose in the UI stays
                tags[_KIND_OF_EXPERIMENT] = "custom_model_development"
            for key, value in tags.items():
                if experiment.tags.get(key) != value:
                    self._client.set_experiment_tag(experiment_id, key, value)
        return experiment_id

    def _get_or_create_parent(self) -> str:
        found = self._client.search_runs(
            [self._experiment_id], filter_string=f"tags.`orpo_ray.sweep_id` = '{self._sweep_id}'", max_results=1
        )
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            steps = [m.step for m in latest_points(found[0]) if m.key.startswith("system/")]
            self._next_system_step = max(steps, default=0) + 1
            return self._describe_parent(found[0], f"resumed/{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}/")
        tags = self._origin_tags() | {
            "orpo_ray.sweep_id": self._sweep_id,
            MLFLOW_RUN_NOTE: notes.sweep_note(self._config),
        }
        run = self._client.create_run(self._experiment_id, tags=tags, run_name=self._config.name)
        return self._describe_parent(run, folder="")

    def _origin_tags(self) -> dict[str, str]:
        git = self._provenance["git"] or {}
        tags = {
            "orpo_ray.version": str(self._provenance["packages"]["orpo-ray"]),
            MLFLOW_SOURCE_NAME: without_password(self._provenance["command"]),
            MLFLOW_SOURCE_TYPE: "LOCAL",
        }
        if git.get("commit"):
            tags |= {MLFLOW_GIT_COMMIT: git["commit"], "orpo_ray.git_dirty": as_text(git["dirty"])}
        return {key: str(value) for key, value in resolve_tags(tags).items()}  # adds the user

    def _describe_parent(self, run: Run, folder: str) -> str:
        """Parameters and artifacts of the parent; in a `folder` of their own where it is resumed: code may differ."""
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

    # Delivery, in its threads: each trial's events come one call after another, different trials' at the same time

    def _send(self, key: str | None, events: list[dict[str, Any]]) -> None:
        """Events of a trial (its id), of the nodes (`_SYSTEM`), or of the parent run (None).

        Raises:
            Unreachable: the server could not take them now.
        """
        try:
            if key is None:
                self._deliver_parent(events)
            elif key == _SYSTEM:
                points = [m for event in events for m in metric_points(event["metrics"], event["time"], event["step"])]
                self._client.log_batch(self.parent_id, metrics=points, synchronous=True)
            else:
                self._deliver_trial(key, events)
        except (MlflowException, OSError) as error:
            if not _is_temporary(error):
                raise
            if key is not None and key != _SYSTEM:
                self._in_doubt.add(key)
            raise Unreachable(without_password(str(error))) from error

    def _find_children(self, trial_id: str | None = None) -> dict[str, ChildRun]:
        """Every trial of the sweep that MLflow knows, or one of them, with how far it was delivered."""
        children: dict[str, ChildRun] = {}
        wanted = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.parent_id}'"
        if trial_id is not None:
            wanted += f" and tags.`orpo_ray.trial_id` = '{trial_id}'"
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id], filter_string=wanted, max_results=1000, page_token=token
            )
            for run in page:
                children[run.data.tags["orpo_ray.trial_id"]] = known_child(run)
            token = page.token
            if not token:
                break
        self.run_ids.update({trial_id: child.run_id for trial_id, child in children.items()})
        return children

    def _deliver_trial(self, trial_id: str, events: list[dict[str, Any]]) -> None:
        if trial_id in self._in_doubt:
            self._children.pop(trial_id, None)
            self._children.update(self._find_children(trial_id))
            self._in_doubt.discard(trial_id)
        if events[0]["event"] == "submitted":
            self._trials[trial_id] = _Trial(events[0]["params"], events[0].get("purpose", "search"))
        if trial_id not in self._trials:
            raise ValueError(f"event {events[0]['event']!r} of trial {trial_id} comes before its submission")
        trial = self._trials[trial_id]
        child = self._children.get(trial_id)
        if child is None:
            child = self._children[trial_id] = self._create_child(trial_id, events[0]["time"], trial)
        end = next((event for event in events if event["event"] == "finished"), None)
        if not child.is_done:
            self._deliver_events(trial_id, trial, child, events)
            if end is not None:
                self._client.set_terminated(child.run_id, _TERMINAL[end["status"]], end_time=end["time"])
                child.is_done, child.is_open = True, False
        if end is not None and not child.has_generations:
            # After the end: where artifacts cannot be stored, the run is at least complete.
            self._log_generations(trial_id, child)

    def _deliver_events(self, trial_id: str, trial: _Trial, child: ChildRun, events: list[dict[str, Any]]) -> None:
        if not child.is_open:
            self._client.update_run(child.run_id, status="RUNNING")
            child.is_open = True
        metrics: list[Metric] = []
        params: dict[str, Any] = {}
        tags: dict[str, str] = {}
        reached = dict(child.watermark)
        for event in events:
            match kind := event["event"]:
                case "submitted":
                    params |= trial_params(self._config, event["params"])
                    tags["orpo_ray.purpose"] = trial.purpose
                    tags[MLFLOW_RUN_NOTE] = self._note(trial_id, trial)
                case "started":
                    facts = event.get("facts", {})
                    params |= worker_params(facts)
                    if "forward/fallback" in facts:
                        tags["orpo_ray.fallback"] = facts["forward/fallback"]
                    self._log_inputs(child, facts)
                case "log" | "eval":
                    # At the watermark itself again: its batch may have been cut in two. MLflow drops equal points.
                    if event["step"] >= reached.get(kind, 0):
                        metrics += metric_points(event["metrics"], event["time"], event["step"])
                        reached[kind] = event["step"]
                case "retry":
                    tags |= {"orpo_ray.retries": str(event["attempt"]), "orpo_ray.last_retry": event["error"]}
                case "paused" | "preempted" | "warning":
                    pass
                case "forked":
                    # Parameters cannot change in MLflow; the axes' values over time are metrics.
                    axes: dict[str, float | None] = {
                        f"axes/{name}": v for name, v in event["params"].items() if isinstance(v, int | float)
                    }
                    metrics += metric_points(axes, event["time"], event["step"])
                    tags["orpo_ray.last_fork"] = f"of trial {event['donor']} at step {event['step']}"
                    trial.params, trial.is_forked = event["params"], True
                case "finished":
                    # Step 0: a bar in the UI, not a line.
                    model_id = self._model_of(trial_id, trial, child, event)
                    metrics += metric_points(final_metrics(event), event["time"], step=0, model_id=model_id)
                    tags |= end_tags(event) | {MLFLOW_RUN_NOTE: self._note(trial_id, trial, event)}
                case _:
                    raise ValueError(f"unknown event {kind!r} of trial {trial_id}")
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
            self._experiment_id,
            start_time=time_ms,
            tags=self._origin_tags() | {MLFLOW_PARENT_RUN_ID: self.parent_id, "orpo_ray.trial_id": trial_id},
            run_name=describe(trial.params) if trial.params else self._config.name,
        )
        self.run_ids[trial_id] = run.info.run_id
        return ChildRun(run.info.run_id)

    def _address(self, run_id: str) -> str:
        """Of a run's page in MLflow's UI, from another of its pages."""
        return f"#/experiments/{self._experiment_id}/runs/{run_id}"

    def _note(self, trial_id: str, trial: _Trial, end: dict[str, Any] | None = None) -> str:
        command = notes.trial_command(self._config, trial_id, trial.params, self._provenance["command"])
        return notes.trial_note(
            self._config,
            trial_id,
            trial.params,
            parent=self._address(self.parent_id),
            command=None if trial.is_forked else without_password(command),
            purpose=trial.purpose,
            end=end,
        )

    def _log_inputs(self, child: ChildRun, facts: dict[str, Any]) -> None:
        """The data it trains and is evaluated on, which only the worker has seen; the parent run lists it too."""
        if child.has_inputs or "data/train_digest" not in facts:  # journals of before it was told
            return
        datasets = dataset_inputs(self._config.data, facts)
        with self._inputs_lock:  # two at once would both create the data set, and one be refused
            try:
                self._client.log_inputs(child.run_id, datasets=datasets)
                digests = {data.dataset.digest for data in datasets}
                if not digests <= self._parent_digests:  # other tokenizers make other data of the same pairs
                    self._client.log_inputs(self.parent_id, datasets=datasets)
                    self._parent_digests |= digests
            except MlflowException as error:
                _pass_over(error, "the data sets of a trial")
        child.has_inputs = True

    def _model_of(self, trial_id: str, trial: _Trial, child: ChildRun, end: dict[str, Any]) -> str | None:
        """Id of the MLflow model that stands for the trial's checkpoint, whose files stay where they are."""
        if end["status"] != "finished" or end["checkpoint"] is None:
            return None
        try:
            return self._get_or_create_model(trial_id, trial, child, end)
        except MlflowException as error:  # servers before MLflow 3 know of none
            _pass_over(error, f"the model of trial {trial_id}")
            return None

    def _get_or_create_model(self, trial_id: str, trial: _Trial, child: ChildRun, end: dict[str, Any]) -> str:
        if child.was_found:
            for model in self._client.search_logged_models(
                [self._experiment_id], filter_string=f"source_run_id = '{child.run_id}'", max_results=1
            ):
                return str(model.model_id)
        model = self._client.create_logged_model(
            self._experiment_id,
            name=re.sub(r"[/:.%\"']", "-", f"{self._config.name}-{trial_id}"),
            source_run_id=child.run_id,
            tags={MLFLOW_MODEL_IS_EXTERNAL: "true", "orpo_ray.checkpoint": end["checkpoint"]},
            params={name: as_text(value) for name, value in self._config.settings(trial.params).items()},
            model_type="checkpoint",
        )
        self._client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _log_generations(self, trial_id: str, child: ChildRun) -> None:
        """What the trial's model answered at each evaluation, as the table that MLflow's UI shows.

        `client.log_table` would add to a table that is there already, and so double it after a restart.
        """
        from orpo_ray.storage import generations  # imports torch, which who only reads runs need not wait for

        rows = generations.read(self._config.run_dir / "trials" / trial_id)
        if rows:
            table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
            self._client.log_text(child.run_id, json.dumps(table, ensure_ascii=False), GENERATIONS_ARTIFACT)
            tag = json.dumps([{"path": GENERATIONS_ARTIFACT, "type": "table"}])
            self._client.set_tag(child.run_id, MLFLOW_LOGGED_ARTIFACTS, tag)
        child.has_generations = True

    def _deliver_parent(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["event"] == "attach":
                path, home = Path(event["path"]).absolute(), self._config.run_dir
                folder = path.parent.relative_to(home).as_posix() if path.is_relative_to(home) else "."
                self._client.log_artifact(self.parent_id, str(path), None if folder == "." else folder)
            else:
                self._end_parent(event["results"], event["interrupted"])

    def _end_parent(self, results: dict[str, Any], interrupted: bool) -> None:
        # The journal's time, not the clock's: closing the same sweep again writes the same points.
        at = self._last_time or int(time.time() * 1000)
        for child in self._children.values():
            if not child.is_done:
                self._client.set_terminated(child.run_id, "KILLED" if interrupted else "FAILED", end_time=at)
                child.is_open = False
        links = {trial_id: self._address(run_id) for trial_id, run_id in self.run_ids.items()}
        tags = {MLFLOW_RUN_NOTE: notes.sweep_answer(self._config, results, links, interrupted=interrupted)}
        metrics: list[Metric] = []
        if best := results["best"]:
            metrics = metric_points(final_metrics(best), at, step=0)
            tags |= {f"best.{name}": as_text(value) for name, value in best["params"].items()}
            if best["trial_id"] in self.run_ids:
                tags["best_run_id"] = self.run_ids[best["trial_id"]]
        self._client.log_batch(
            self.parent_id,
            metrics=metrics,
            tags=[RunTag(key, tag_text(value)) for key, value in tags.items()],
            synchronous=True,
        )
        finished = any(trial["status"] == "finished" for trial in results["trials"])
        status = "KILLED" if interrupted else "FINISHED" if finished else "FAILED"
        self._client.set_terminated(self.parent_id, status, end_time=at)


def _pass_over(error: MlflowException, what: str) -> None:
    """A trial's numbers must not be lost for what only adorns its run.

    Raises:
        MlflowException: it was only that the server cannot be reached, and is worth another try.
    """
    if _is_temporary(error):
        raise error
    log.warning("MLflow refused %s: %s", what, without_password(str(error)))


def _is_temporary(error: Exception) -> bool:
    """Worth another try: no connection, no time, or no permission yet. Not: a request that the server understood."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status >= 500 or status in (401, 403, 408, 429)
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
