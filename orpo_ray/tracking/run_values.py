"""Values of an MLflow run: parameters, tags, metrics and data sets of a trial."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Run
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_LOGGED_ARTIFACTS, MLFLOW_SOURCE_NAME

from orpo_ray.config import DataConfig

_KIND = {"train": "log", "perf": "log", "eval": "eval"}
"""Prefix of a metric -> the event it comes with."""
_MAX_TAG_BYTES = 7900  # MLflow refuses tags over 8000
GENERATIONS_ARTIFACT = "generations.json"


@dataclass(slots=True)
class ChildRun:
    """What is known of a trial's run in MLflow."""

    run_id: str
    is_open: bool = True
    is_done: bool = False
    """Its end was delivered, and so everything before it."""
    watermark: dict[str, int] = field(default_factory=dict)
    """Kind of event -> last step delivered."""
    logged_params: frozenset[str] = frozenset()
    """Keys that MLflow holds already; a second value would be refused."""
    has_inputs: bool = False
    """The data it trains on is noted."""
    has_generations: bool = False
    was_found: bool = False
    """It was read from MLflow, so it may have more than is known here."""


def known_child(run: Run) -> ChildRun:
    watermark: dict[str, int] = {}
    for metric in latest_points(run):
        kind = _KIND.get(metric.key.partition("/")[0])
        if kind:
            watermark[kind] = max(watermark.get(kind, 0), metric.step)
    is_open = run.info.status == "RUNNING"
    return ChildRun(
        run_id=run.info.run_id,
        is_open=is_open,
        # The tag alone may have arrived without the end that follows it.
        is_done="orpo_ray.status" in run.data.tags and not is_open,
        watermark=watermark,
        logged_params=frozenset(run.data.params),
        has_inputs=bool(run.inputs.dataset_inputs),
        has_generations=GENERATIONS_ARTIFACT in run.data.tags.get(MLFLOW_LOGGED_ARTIFACTS, ""),
        was_found=True,
    )


def latest_points(run: Run) -> Iterable[Any]:
    """The latest point of each key; `RunData.metrics` has no steps."""
    points: Iterable[Any] = run.data.to_proto().metrics
    return points


def metric_points(
    metrics: Mapping[str, float | None], time_ms: int, step: int, model_id: str | None = None
) -> list[Metric]:
    return [
        Metric(k, float("nan") if v is None else float(v), time_ms, step, model_id=model_id) for k, v in metrics.items()
    ]


def final_name(metric: str) -> str:
    return f"final/{metric.removeprefix('eval/')}"


def final_metrics(trial: dict[str, Any]) -> dict[str, float | None]:
    """One number per trial and held-out metric, for MLflow's tables and parallel coordinates."""
    final = {final_name(k): v for k, v in trial["metrics"].items() if k.startswith("eval/")}
    return final | {"final/steps": trial["steps"], "final/train_seconds": trial["train_seconds"]}


def end_tags(end: dict[str, Any]) -> dict[str, str]:
    tags = {"orpo_ray.status": end["status"]}
    tags |= {"orpo_ray.error": end["error"]} if end["error"] else {}
    tags |= {"orpo_ray.diverged": "true"} if end["status"] == "diverged" else {}
    tags |= {"orpo_ray.reused_from": end["reused_from"]} if end.get("reused_from") else {}
    tags |= {"orpo_ray.checkpoint": end["checkpoint"]} if end["checkpoint"] else {}
    return tags


def tag_text(text: str) -> str:
    return text.encode()[:_MAX_TAG_BYTES].decode(errors="ignore")


def worker_params(facts: dict[str, Any]) -> dict[str, Any]:
    """What only the worker knows, as parameters."""
    return {key.replace("/", "."): value for key, value in facts.items()}


def dataset_inputs(data: DataConfig, facts: dict[str, Any]) -> list[DatasetInput]:
    """Training and held-out pairs, as MLflow's UI shows data sets."""
    inputs = []
    for part, context, path in (
        ("train", "training", data.path),
        ("eval", "evaluation", data.eval_path or data.path),
    ):
        kind, source = _source(path)
        dataset = Dataset(
            name=Path(path).name if kind == "local" else path,
            digest=facts[f"data/{part}_digest"][:32],  # MLflow takes 36 characters
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
