"""Read sweeps and trials back from MLflow."""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from orpo_ray.config import METRIC_MODES
from orpo_ray.config.flatten import AXES
from orpo_ray.errors import NoSuchRunError
from orpo_ray.files import read_json
from orpo_ray.storage.events import Status
from orpo_ray.storage.find import nearest, suggest
from orpo_ray.storage.records import SEED, SPACE_PREFIX, SweepRecord, TrialRecord, choose, ordered
from orpo_ray.storage.run_dir import SWEEP_FILE

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


log = logging.getLogger(__name__)
_OVERFLOW = 1e308  # MLflow stores ±inf as the largest double


def compare_page(uri: str, run_ids: Sequence[str]) -> str:
    """Address of the page of the MLflow server at `uri` that shows these runs side by side.

    Raises:
        TrackingError: the server does not answer, or lacks one of the runs.
    """
    from orpo_ray.provenance import without_password

    with asked(uri) as client:
        experiments = sorted({client.get_run(run_id).info.experiment_id for run_id in run_ids})
    listed = [quote(json.dumps(ids, separators=(",", ":"))) for ids in (list(run_ids), experiments)]
    return f"{without_password(uri).rstrip('/')}/#/compare-runs?runs={listed[0]}&experiments={listed[1]}"


@contextmanager
def asked(uri: str) -> Iterator[MlflowClient]:
    """An MLflow client for `uri`; its errors are raised as TrackingError.

    Raises:
        TrackingError: the server refuses or does not answer.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from orpo_ray.provenance import without_password
    from orpo_ray.tracking.uri import TrackingError, bound_requests

    bound_requests()
    try:
        yield MlflowClient(uri)
    except (MlflowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise TrackingError(
            f"MLflow at {without_password(uri)} cannot be queried: {without_password(str(error))}\n"
            "Start the server, or correct --tracking-uri (or MLFLOW_TRACKING_URI)"
        ) from error


def from_mlflow(name: str, tracking_uri: str | None, experiment: str | None, output_dir: Path) -> SweepRecord:
    """Read a sweep from MLflow.

    Args:
        name: of the sweep, NAME/TRIAL_ID of a trial, or an MLflow run id.
        tracking_uri: None: see `uri.resolve_uri`.
        experiment: MLflow experiment to search; None: all.
        output_dir: where run directories are.

    Raises:
        NoSuchRunError: MLflow has no such sweep or trial.
        TrackingError: MLflow refuses or does not answer.
    """
    from orpo_ray.provenance import without_password
    from orpo_ray.tracking.uri import resolve_uri

    uri = resolve_uri(tracking_uri, output_dir)
    file = Path(uri.partition(":///")[2]) if uri.startswith("sqlite") else None
    missing = (
        f"no sweep, trial or run {name!r}: neither a run directory, nor the name of a sweep in {output_dir} "
        f"({suggest(name, output_dir)}), nor "
    )
    if file is not None and not file.exists():
        # Opening the file would create it with all its tables.
        raise NoSuchRunError(
            f"{missing}in MLflow, for there is no {file}; correct the name, or say where its MLflow is (tracking URI)"
        )
    with asked(uri) as client:
        parent, trial_id = _find_parent(client, name, experiment)
        if parent is None:
            known = sorted({str(run.info.run_name) for run in _parents(client, _experiments(client, experiment))})
            near = nearest(name, known, "there is no sweep there")
            raise NoSuchRunError(f"{missing}a name or a run id in MLflow at {without_password(uri)} ({near})")
        record = _parent_record(client, parent, uri, output_dir)
    return choose(record, trial_id)


def sweep_of_run(run_id: str, uri: str) -> tuple[str | None, str | None, dict[str, Any]]:
    """Find the sweep that wrote an MLflow run.

    Returns:
        The sweep's id (None: no sweep of orpo-ray wrote the run), the trial's id (None: a parent run), and the sweep's
        config as given.

    Raises:
        TrackingError: there is no such run, or MLflow does not answer.
    """
    with asked(uri) as client, tempfile.TemporaryDirectory() as scratch:
        tags = client.get_run(run_id).data.tags
        parent_id = tags.get("mlflow.parentRunId", run_id)
        sweep_id = client.get_run(parent_id).data.tags.get("orpo_ray.sweep_id")
        if sweep_id is None:
            return None, None, {}
        file = Path(client.download_artifacts(parent_id, "config.yaml", scratch))
        return sweep_id, tags.get("orpo_ray.trial_id"), yaml.safe_load(file.read_text("utf-8"))


def _find_parent(client: MlflowClient, name: str, experiment: str | None) -> tuple[Run | None, str | None]:
    """The parent run, and the trial id if a trial is named. `name` is a run id, a sweep's name or NAME/TRIAL_ID."""
    if re.fullmatch("[0-9a-f]{32}", name):
        if (run := _run_of(client, name)) is None:
            return None, None
        parent_id = run.data.tags.get("mlflow.parentRunId")
        trial_id = run.data.tags.get("orpo_ray.trial_id")
        if parent_id and trial_id:
            return client.get_run(parent_id), trial_id
        return (run if "orpo_ray.sweep_id" in run.data.tags else None), None
    experiments = _experiments(client, experiment)
    head, _, tail = name.rpartition("/")
    for sweep, trial_id in ((name, None), (head, tail)):
        found = _parents(client, experiments, sweep) if sweep else []
        if len(found) > 1:
            others = ", ".join(run.info.run_id for run in found[1:])
            log.warning(
                "%d sweeps in MLflow are named %s: taking the newest, run %s; the others by run id: %s",
                len(found),
                sweep,
                found[0].info.run_id,
                others,
            )
        if found:
            return found[0], trial_id
    return None, None


def _run_of(client: MlflowClient, run_id: str) -> Run | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _experiments(client: MlflowClient, name: str | None) -> list[str]:
    from orpo_ray.tracking.uri import TrackingError

    known = {e.name: e.experiment_id for e in client.search_experiments(max_results=1000)}
    if name is None:
        return list(known.values())
    if name not in known:
        raise TrackingError(f"MLflow has no experiment {name!r}; it has {', '.join(sorted(known))}")
    return [known[name]]


def _parents(client: MlflowClient, experiments: list[str], name: str | None = None) -> list[Run]:
    """Parent runs of sweeps, the newest first."""
    # Quotes cannot be escaped in a filter, and names of sweeps have none.
    if name is not None and "'" in name:
        return []
    where = "tags.`orpo_ray.sweep_id` LIKE '%'" + (f" AND attributes.run_name = '{name}'" if name else "")
    return search_all_runs(client, experiments, where, "attributes.start_time DESC")


def search_all_runs(
    client: MlflowClient, experiment_ids: list[str], where: str, order: str = "attributes.start_time ASC"
) -> list[Run]:
    """All runs that match a filter, read page by page."""
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            experiment_ids, filter_string=where, max_results=1000, order_by=[order], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _parent_record(client: MlflowClient, parent: Run, uri: str, output_dir: Path) -> SweepRecord:
    params = {key: _value(text) for key, text in parent.data.params.items()}
    space = {key.removeprefix(SPACE_PREFIX): axis for key, axis in params.items() if key.startswith(SPACE_PREFIX)}
    where = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = search_all_runs(client, [parent.info.experiment_id], where, "attributes.start_time ASC")
    if "sweep.metric" not in params:
        from orpo_ray.tracking.uri import TrackingError

        raise TrackingError(f"MLflow run {parent.info.run_id} is being written, and has no parameters yet; try again")
    # A run is made before its parameters are there: such a one has nothing to tell yet.
    children = [r for r in children if "orpo_ray.trial_id" in r.data.tags and {*space, SEED} <= r.data.params.keys()]
    children.sort(key=lambda run: (run.info.start_time, run.data.tags["orpo_ray.trial_id"]))
    bundle_axis = next((name for name, axis in space.items() if axis["type"] == "bundle"), None)
    name, metric = str(parent.info.run_name), params["sweep.metric"]
    run_dir = output_dir / name
    is_here = (run_dir / SWEEP_FILE).is_file() and read_json(run_dir / SWEEP_FILE)["sweep_id"] == parent.data.tags[
        "orpo_ray.sweep_id"
    ]
    return SweepRecord(
        name=name,
        metric=metric,
        mode=METRIC_MODES[metric],
        axes=tuple(sorted(space)),
        bundle_axis=bundle_axis,
        settings={key: value for key, value in params.items() if not key.startswith("sweep.") and "." in key},
        search={key: value for key, value in params.items() if key.startswith("sweep.")},
        trials=tuple(_trial_record(run, space, bundle_axis) for run in children),
        run_dir=run_dir if is_here else None,
        tracking_uri=uri,
    )


def _trial_record(run: Run, space: dict[str, Any], bundle_axis: str | None) -> TrialRecord:
    tags, metrics = run.data.tags, run.data.metrics
    settings = {key: _value(text) for key, text in run.data.params.items() if not key.startswith(AXES)}
    for name, axis in space.items():
        settings[name] = metrics.get(
            f"axes/{name}", _on_axis(axis, run.data.params[name])
        )  # after a fork, its new value
    purpose = tags.get("orpo_ray.purpose", "search")
    params = {name: settings[name] for name in space} | ({SEED: settings[SEED]} if purpose == "confirm" else {})
    final = {key.removeprefix("final/"): value for key, value in metrics.items() if key.startswith("final/")}
    steps, seconds = final.pop("steps", None), final.pop("train_seconds", None)
    status = Status(tags.get("orpo_ray.status", Status.UNFINISHED))
    if status is Status.UNFINISHED:
        points = run.data.to_proto().metrics  # with their steps, which RunData.metrics lacks
        steps = max((m.step for m in points if m.key.startswith(("train/", "eval/"))), default=0)
        measured = {key: value for key, value in metrics.items() if key.startswith("eval/")}
    else:
        measured = {f"eval/{name}": value for name, value in final.items()}
    return TrialRecord(
        trial_id=tags["orpo_ray.trial_id"],
        bundle=str(settings[bundle_axis]) if bundle_axis else "",
        purpose=purpose,
        status=status,
        params=ordered(params),
        settings=settings,
        steps=int(steps or 0),
        attempts=int(tags.get("orpo_ray.retries", 0)) + 1 if "model.parameters" in settings else 0,
        train_seconds=None if seconds is None or math.isnan(seconds) else seconds,
        metrics={key: math.nan if abs(value) > _OVERFLOW else value for key, value in measured.items()},
        checkpoint=tags.get("orpo_ray.checkpoint"),
        mlflow_run_id=run.info.run_id,
        reused_from=tags.get("orpo_ray.reused_from"),
        submitted_ms=run.info.start_time,
        ended_ms=run.info.end_time if status is not Status.UNFINISHED else None,
    )


def _value(text: str) -> Any:
    """Inverse of `flatten.as_text`, as far as possible."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _on_axis(axis: dict[str, Any], text: str) -> Any:
    """The candidate with this text in MLflow, so that a string that looks like a number stays a string."""
    return next((c for c in axis.get("values", ()) if text in (c, json.dumps(c, ensure_ascii=False))), _value(text))
