"""Values of an MLflow run: parameters, tags, metrics and data sets of a trial."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Run
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_GIT_COMMIT,
    MLFLOW_LOGGED_ARTIFACTS,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
)

from orpo_ray.config import DataConfig
from orpo_ray.config.flatten import as_text
from orpo_ray.provenance import without_password
from orpo_ray.storage.events import Evaluated, Finished, Logged, Status

_KIND = {"train": Logged.kind, "perf": Logged.kind, "eval": Evaluated.kind}
"""Prefix of a metric -> kind of the event that reports it."""
_MAX_TAG_BYTES = 7900  # MLflow refuses tags over 8000
GENERATIONS_ARTIFACT = "generations.json"


@dataclass(slots=True)
class ChildRun:
    """Delivery state of a trial's MLflow run."""

    run_id: str
    is_open: bool = True
    is_done: bool = False
    """Its end, and so everything before it, was delivered."""
    watermark: dict[str, int] = field(default_factory=dict)
    """Kind of event -> last step delivered."""
    logged_params: frozenset[str] = frozenset()
    """Names of logged parameters; MLflow would refuse a second value."""
    has_inputs: bool = False
    """Its data sets are logged."""
    has_generations: bool = False
    was_found: bool = False
    """It was read from MLflow, so it may hold more than this process has sent."""


def known_child(run: Run) -> ChildRun:
    """Delivery state of a run that MLflow has already."""
    watermark: dict[str, int] = {}
    for metric in latest_points(run):
        kind = _KIND.get(metric.key.partition("/")[0])
        if kind:
            watermark[kind] = max(watermark.get(kind, 0), metric.step)
    is_open = run.info.status == "RUNNING"
    return ChildRun(
        run_id=run.info.run_id,
        is_open=is_open,
        # The tag may have arrived without the end of the run that follows it.
        is_done="orpo_ray.status" in run.data.tags and not is_open,
        watermark=watermark,
        logged_params=frozenset(run.data.params),
        has_inputs=bool(run.inputs.dataset_inputs),
        has_generations=GENERATIONS_ARTIFACT in run.data.tags.get(MLFLOW_LOGGED_ARTIFACTS, ""),
        was_found=True,
    )


def latest_points(run: Run) -> Iterable[Any]:
    """Latest point of each metric, with its step, which `RunData.metrics` lacks."""
    points: Iterable[Any] = run.data.to_proto().metrics
    return points


def metric_points(
    metrics: Mapping[str, float | None], time_ms: int, step: int, model_id: str | None = None
) -> list[Metric]:
    """MLflow metrics of one step; None becomes NaN."""
    return [
        Metric(k, float("nan") if v is None else float(v), time_ms, step, model_id=model_id) for k, v in metrics.items()
    ]


def final_name(metric: str) -> str:
    """Name under which MLflow holds the final value of a held-out metric."""
    return f"final/{metric.removeprefix('eval/')}"


def final_metrics(
    metrics: Mapping[str, float | None], steps: int, train_seconds: float | None
) -> dict[str, float | None]:
    """One value per trial and held-out metric, for MLflow's tables and parallel coordinates."""
    final = {final_name(k): v for k, v in metrics.items() if k.startswith("eval/")}
    return final | {"final/steps": steps, "final/train_seconds": train_seconds}


def end_tags(end: Finished) -> dict[str, str]:
    """Tags of a trial's run that describe its end."""
    tags = {"orpo_ray.status": end.status.value}
    tags |= {"orpo_ray.error": end.error} if end.error else {}
    tags |= {"orpo_ray.diverged": "true"} if end.status is Status.DIVERGED else {}
    tags |= {"orpo_ray.reused_from": end.reused_from} if end.reused_from else {}
    tags |= {"orpo_ray.checkpoint": end.checkpoint} if end.checkpoint else {}
    return tags


def tag_text(text: str) -> str:
    """The text, truncated to the length that MLflow accepts."""
    return text.encode()[:_MAX_TAG_BYTES].decode(errors="ignore")


def worker_params(facts: dict[str, Any]) -> dict[str, Any]:
    """Values that only the worker knows, as MLflow parameters."""
    return {key.replace("/", "."): value for key, value in facts.items()}


def dataset_inputs(data: DataConfig, facts: dict[str, Any]) -> list[DatasetInput]:
    """Training and held-out pairs, as data sets for MLflow's UI."""
    inputs = []
    for part, context, path in (
        ("train", "training", data.path),
        ("eval", "evaluation", data.eval_path or data.path),
    ):
        kind, source = _source(path)
        dataset = Dataset(
            name=Path(path).name if kind == "local" else path,
            digest=facts[f"data/{part}_digest"][:32],  # MLflow accepts 36 characters
            source_type=kind,
            source=json.dumps(source),
            profile=json.dumps({"num_rows": facts[f"data/{part}_pairs"]}),
        )
        inputs.append(DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)]))
    return inputs


def _source(path: str) -> tuple[str, dict[str, Any]]:
    """Kind of a data set's source and its address, in the forms that `mlflow.data.get_source` reads."""
    if path.startswith("builtin://"):
        return "code", {"tags": {MLFLOW_SOURCE_NAME: path}}
    if Path(path).is_absolute():  # `config` makes the paths of local files absolute
        return "local", {"uri": path}
    return "hugging_face", {"path": path}


def origin_tags(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Tags of every run of a sweep: versions, command, commit and user.

    Args:
        provenance: from `provenance.collect`.
    """
    git = provenance["git"] or {}
    tags = {
        "orpo_ray.version": str(provenance["packages"]["orpo-ray"]),
        MLFLOW_SOURCE_NAME: without_password(provenance["command"]),
        MLFLOW_SOURCE_TYPE: "LOCAL",
    }
    if git.get("commit"):
        tags |= {MLFLOW_GIT_COMMIT: git["commit"], "orpo_ray.git_dirty": as_text(git["dirty"])}
    return {key: str(value) for key, value in resolve_tags(tags).items()}  # adds the user


def run_address(experiment_id: str, run_id: str) -> str:
    """Address of a run's page, for links from another page of MLflow's UI."""
    return f"#/experiments/{experiment_id}/runs/{run_id}"
