"""MLflow: one parent run per sweep, one child per trial, fed from the sweep's journal."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags

from orpo_ray.config import ExperimentConfig
from orpo_ray.delivery import Delivery, Unreachable, backoffs
from orpo_ray.mlflow_uri import TrackingError, bound_requests, resolve_uri, without_password
from orpo_ray.space import describe

log = logging.getLogger(__name__)

_TERMINAL = {"finished": "FINISHED", "stopped_early": "KILLED", "diverged": "FAILED", "failed": "FAILED"}
"""Status of a trial -> status of its MLflow run."""

_KIND = {"train": "log", "perf": "log", "eval": "eval"}
"""Prefix of a metric -> the event it comes with."""

_MAX_TAG = 5000  # MLflow refuses tags over 8000 bytes


@dataclass(slots=True)
class _Child:
    """What is known of a trial's run in MLflow."""

    run_id: str
    is_open: bool = True
    is_done: bool = False
    """Its end was delivered, and so everything before it."""
    watermark: dict[str, int] = field(default_factory=dict)
    """Kind of event -> last step delivered."""
    logged_params: frozenset[str] = frozenset()
    """Keys that MLflow holds already; a second value would be refused."""


class SweepTracker:
    """Delivers a sweep's events to MLflow from a thread of its own; a server that is away holds up nobody.

    Events go out in order, in batches. While the server cannot be reached they wait in memory, and the journal keeps
    them on disk: feed it again, whole, after a restart of the sweep. Nothing is written twice, since a point's step,
    time and value come from the event, and points below a run's last step are not sent at all.
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
        self._children: dict[str, _Child] | None = None
        self._last_time = 0
        self._delivery = Delivery("MLflow", self._send)

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
        if self.uri.startswith("sqlite"):
            Path(self.uri.partition(":///")[2]).parent.mkdir(parents=True, exist_ok=True)
        give_up = time.monotonic() + timeout_s
        for wait in backoffs():
            try:
                self._client = MlflowClient(self.uri)
                self._experiment_id = self._get_or_create_experiment()
                self.parent_id = self._get_or_create_parent()
                break
            except (MlflowException, OSError) as error:
                if not _is_temporary(error) or time.monotonic() + wait > give_up:
                    raise TrackingError(
                        f"MLflow at {without_password(self.uri)} cannot be used: {without_password(str(error))}\n"
                        "Start the server, correct tracking.uri (or MLFLOW_TRACKING_URI), or leave both unset for a "
                        "SQLite file in output_dir"
                    ) from error
                log.warning("MLflow does not answer yet: %s", without_password(str(error)))
                time.sleep(wait)
        self._delivery.start()
        return self.parent_id

    def handle(self, events: Iterable[dict[str, Any]]) -> None:
        """Queue events of the journal, in its order; returns at once. Events seen before do no harm."""
        self._delivery.put((event.get("trial_id"), event) for event in events)

    def attach(self, paths: Iterable[Path]) -> None:
        """Queue files to be stored with the parent run; they are read when delivered, at the latest in `close`."""
        self.handle({"event": "_attach", "path": str(path)} for path in paths)

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
        self.handle([{"event": "_close", "results": results, "interrupted": interrupted}])
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
                experiment_id: str = self._client.create_experiment(name, artifact_location=artifacts)
                return experiment_id
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self._client.get_experiment_by_name(name)  # another process was faster
        if experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"MLflow experiment {name!r} was deleted: `mlflow experiments restore -x {experiment.experiment_id}`, "
                "or choose another tracking.experiment"
            )
        return str(experiment.experiment_id)

    def _get_or_create_parent(self) -> str:
        found = self._client.search_runs(
            [self._experiment_id], filter_string=f"tags.`orpo_ray.sweep_id` = '{self._sweep_id}'", max_results=1
        )
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            return self._describe_parent(found[0], f"resumed/{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}/")
        tags = self._origin_tags() | {"orpo_ray.sweep_id": self._sweep_id, "mlflow.note.content": _note(self._config)}
        run = self._client.create_run(self._experiment_id, tags=tags, run_name=self._config.name)
        return self._describe_parent(run, folder="")

    def _origin_tags(self) -> dict[str, str]:
        git = self._provenance["git"] or {}
        tags = {
            "orpo_ray.version": str(self._provenance["packages"]["orpo-ray"]),
            "mlflow.source.name": without_password(self._provenance["command"]),
            "mlflow.source.type": "LOCAL",
        }
        if git.get("commit"):
            tags |= {"mlflow.source.git.commit": git["commit"], "orpo_ray.git_dirty": as_text(git["dirty"])}
        return {key: str(value) for key, value in resolve_tags(tags).items()}  # adds the user

    def _describe_parent(self, run: Run, folder: str) -> str:
        """Parameters and artifacts of the parent; in a `folder` of their own where it is resumed: code may differ."""
        run_id: str = run.info.run_id
        params = {k: v for k, v in _parent_params(self._config).items() if k not in run.data.params}
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

    # Delivery, in its thread

    def _send(self, trial_id: str | None, events: list[dict[str, Any]]) -> None:
        """Events of a trial, or of the parent run (None).

        Raises:
            Unreachable: the server could not take them now.
        """
        try:
            if self._children is None:
                self._children = self._find_children()
            if trial_id is None:
                self._deliver_parent(events)
            else:
                self._deliver_trial(self._children, trial_id, events)
        except (MlflowException, OSError) as error:
            if not _is_temporary(error):
                raise
            self._children = None  # the request may have arrived though its answer did not
            raise Unreachable(without_password(str(error))) from error

    def _find_children(self) -> dict[str, _Child]:
        """Every trial of the sweep that MLflow knows, with how far it was delivered."""
        children: dict[str, _Child] = {}
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id],
                filter_string=f"tags.`mlflow.parentRunId` = '{self.parent_id}'",
                max_results=1000,
                page_token=token,
            )
            for run in page:
                children[run.data.tags["orpo_ray.trial_id"]] = _known_child(run)
            token = page.token
            if not token:
                break
        self.run_ids.update({trial_id: child.run_id for trial_id, child in children.items()})
        return children

    def _deliver_trial(self, children: dict[str, _Child], trial_id: str, events: list[dict[str, Any]]) -> None:
        self._last_time = max(self._last_time, events[-1]["time"])
        child = children.get(trial_id)
        if child is None:
            child = children[trial_id] = self._create_child(trial_id, events[0])
        if child.is_done:
            return
        if not child.is_open:
            self._client.update_run(child.run_id, status="RUNNING")
            child.is_open = True
        metrics: list[Metric] = []
        params: dict[str, Any] = {}
        tags: dict[str, str] = {}
        reached = dict(child.watermark)
        end: dict[str, Any] | None = None
        for event in events:
            match kind := event["event"]:
                case "submitted":
                    params |= _trial_params(self._config, event["params"])
                    tags["orpo_ray.purpose"] = event.get("purpose", "search")
                case "started":
                    # What only the worker knows, e.g. model/parameters.
                    facts = event.get("facts", {})
                    params |= {key.replace("/", "."): value for key, value in facts.items()}
                    if "forward/fallback" in facts:
                        tags["orpo_ray.fallback"] = facts["forward/fallback"]
                case "log" | "eval":
                    # At the watermark itself again: its batch may have been cut in two. MLflow drops equal points.
                    if event["step"] >= reached.get(kind, 0):
                        metrics += _points(event["metrics"], event["time"], event["step"])
                        reached[kind] = event["step"]
                case "retry":
                    tags |= {"orpo_ray.retries": str(event["attempt"]), "orpo_ray.last_retry": event["error"]}
                case "paused":
                    pass
                case "forked":
                    # Parameters cannot change in MLflow; the axes' values over time are metrics.
                    axes: dict[str, float | None] = {
                        f"axes/{name}": v for name, v in event["params"].items() if isinstance(v, int | float)
                    }
                    metrics += _points(axes, event["time"], event["step"])
                    tags["orpo_ray.last_fork"] = f"of trial {event['donor']} at step {event['step']}"
                case "finished":
                    end = event
                    metrics += _points(_final(event), event["time"], step=0)  # step 0: a bar in the UI, not a line
                    tags |= {"orpo_ray.status": event["status"]}
                    tags |= {"orpo_ray.error": event["error"]} if event["error"] else {}
                    tags |= {"orpo_ray.diverged": "true"} if event["status"] == "diverged" else {}
                    tags |= {"orpo_ray.reused_from": event["reused_from"]} if event.get("reused_from") else {}
                case _:
                    raise ValueError(f"unknown event {kind!r} of trial {trial_id}")
        self._client.log_batch(
            child.run_id,
            metrics=metrics,
            params=[Param(k, as_text(v)) for k, v in params.items() if k not in child.logged_params],
            tags=[RunTag(k, v[:_MAX_TAG]) for k, v in tags.items()],
            synchronous=True,
        )
        if end is not None:
            self._client.set_terminated(child.run_id, _TERMINAL[end["status"]], end_time=end["time"])
            child.is_done, child.is_open = True, False
        child.watermark = reached
        child.logged_params |= params.keys()

    def _create_child(self, trial_id: str, event: dict[str, Any]) -> _Child:
        if event["event"] != "submitted":
            raise ValueError(f"event {event['event']!r} of trial {trial_id} comes before its submission")
        run = self._client.create_run(
            self._experiment_id,
            start_time=event["time"],
            tags=self._origin_tags() | {"mlflow.parentRunId": self.parent_id, "orpo_ray.trial_id": trial_id},
            run_name=describe(event["params"]) if event["params"] else self._config.name,
        )
        self.run_ids[trial_id] = run.info.run_id
        return _Child(run.info.run_id)

    def _deliver_parent(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["event"] == "_attach":
                path, home = Path(event["path"]).absolute(), self._config.run_dir
                folder = path.parent.relative_to(home).as_posix() if path.is_relative_to(home) else "."
                self._client.log_artifact(self.parent_id, str(path), None if folder == "." else folder)
            else:
                self._end_parent(event["results"], event["interrupted"])

    def _end_parent(self, results: dict[str, Any], interrupted: bool) -> None:
        # The journal's time, not the clock's: closing the same sweep again writes the same points.
        at = self._last_time or int(time.time() * 1000)
        for child in (self._children or {}).values():
            if not child.is_done:
                self._client.set_terminated(child.run_id, "KILLED" if interrupted else "FAILED", end_time=at)
                child.is_open = False
        if best := results["best"]:
            tags = {f"best.{name}": as_text(value) for name, value in best["params"].items()}
            if best["trial_id"] in self.run_ids:
                tags["best_run_id"] = self.run_ids[best["trial_id"]]
            self._client.log_batch(
                self.parent_id,
                metrics=_points(_final(best), at, step=0),
                tags=[RunTag(key, value) for key, value in tags.items()],
                synchronous=True,
            )
        finished = any(trial["status"] == "finished" for trial in results["trials"])
        status = "KILLED" if interrupted else "FINISHED" if finished else "FAILED"
        self._client.set_terminated(self.parent_id, status, end_time=at)


def _known_child(run: Run) -> _Child:
    watermark: dict[str, int] = {}
    for metric in run.data.to_proto().metrics:  # the latest point of each key; RunData.metrics has no steps
        kind = _KIND.get(metric.key.partition("/")[0])
        if kind:
            watermark[kind] = max(watermark.get(kind, 0), metric.step)
    is_open = run.info.status == "RUNNING"
    return _Child(
        run_id=run.info.run_id,
        is_open=is_open,
        # The tag alone may have arrived without the end that follows it.
        is_done="orpo_ray.status" in run.data.tags and not is_open,
        watermark=watermark,
        logged_params=frozenset(run.data.params),
    )


def _points(metrics: dict[str, float | None], time_ms: int, step: int) -> list[Metric]:
    return [Metric(k, float("nan") if v is None else float(v), time_ms, step) for k, v in metrics.items()]


def _final(trial: dict[str, Any]) -> dict[str, float | None]:
    """One number per trial and held-out metric, for MLflow's tables and parallel coordinates."""
    final = {f"final/{k.removeprefix('eval/')}": v for k, v in trial["metrics"].items() if k.startswith("eval/")}
    return final | {"final/steps": trial["steps"], "final/train_seconds": trial["train_seconds"]}


def _is_temporary(error: Exception) -> bool:
    """Worth another try: no connection, no time, or no permission yet. Not: a request that the server understood."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status >= 500 or status in (401, 403, 408, 429)
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def settings_of(config: ExperimentConfig) -> dict[str, Any]:
    """Config path -> value, without the sweep and without where things are kept."""
    return _flat(config.model_dump(mode="json", exclude={"name", "output_dir", "tracking", "sweep"}))


def _trial_params(config: ExperimentConfig, params: dict[str, Any]) -> dict[str, Any]:
    return settings_of(config.trial(params)) | params  # of a bundle, its label too


def _parent_params(config: ExperimentConfig) -> dict[str, str]:
    """What all trials share, and how the rest was searched."""
    flat = settings_of(config)
    if config.sweep is not None:
        tree = config.sweep.model_dump(mode="json")
        space = tree.pop("space")
        for axis in space.values():
            for path in [p for label in axis["values"].values() for p in label] if axis["type"] == "bundle" else []:
                flat.pop(path, None)
        flat = {path: value for path, value in flat.items() if path not in space}
        flat |= _flat(tree, "sweep.") | {f"sweep.space.{name}": axis for name, axis in space.items()}
    return {key: as_text(value) for key, value in flat.items()}


def as_text(value: Any) -> str:
    """A parameter's value as MLflow holds it: as YAML and JSON spell it; a string stays itself."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _note(config: ExperimentConfig) -> str:
    if config.sweep is None or not config.sweep.space:
        return f"One training run, by orpo-ray. Results: `{config.run_dir}`."
    axes = ", ".join(f"`{name}`" for name in config.sweep.space)
    return f"Sweep over {axes}, judged by `{config.sweep.metric}`, by orpo-ray. Results: `{config.run_dir}`."
