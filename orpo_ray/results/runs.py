"""Sweeps by name: where their run directory is, and their trials as records or as a table.

A sweep is read from its run directory or from MLflow, and is the same either way. pandas and MLflow are imported where
they are used: whoever only looks for a run directory does not wait for them.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from orpo_ray.config.experiment import METRIC_MODES
from orpo_ray.config.flatten import AXES, NOT_SETTINGS, flat
from orpo_ray.config.sections import LossConfig
from orpo_ray.config.space import describe
from orpo_ray.storage import sync
from orpo_ray.storage.results import EVENTS_FILE, FITTED_FILE, RESULTS_FILE, SWEEP_FILE, current, read_events

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

SEED = "train.seed"
ALWAYS_SHOWN = ("loss.orpo_lambda", "optim.lr", "model.path", SEED)
"""Settings that are columns of every table, swept or not, so that tables of several sweeps can be put together."""

_OVERFLOW = 1e308  # MLflow holds ±inf as the largest double
_SPACE = "sweep.space."


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial."""

    trial_id: str
    bundle: str
    """Label; "" where there is no bundle axis."""
    purpose: str
    """`search`, or `confirm`: a finalist with another seed."""
    status: str
    """finished, stopped_early, diverged, failed; unfinished before that."""
    params: dict[str, Any]
    """Its place in the space: axis -> value, the seed last. After forks (population-based training) its last."""
    settings: dict[str, Any]
    """Config path -> value, all of them, and what its worker found (`model.parameters`, `forward.rows`, ...)."""
    steps: int
    """Optimizer steps done."""
    attempts: int
    """How often its training was begun; a pause and a resume are one."""
    train_seconds: float | None
    metrics: dict[str, float]
    """Of its last evaluation; NaN where not finite."""
    checkpoint: str | None
    mlflow_run_id: str | None
    reused_from: str | None
    """MLflow run whose result was taken over instead of training."""
    submitted_ms: int | None
    """When it was put in the queue, which is the start of its MLflow run; ms since 1970, UTC."""
    ended_ms: int | None

    @property
    def device_seconds(self) -> float:
        """Training time × workers; 0 where unknown."""
        return (self.train_seconds or 0.0) * int(self.settings.get("scaling.num_workers") or 1)


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """A sweep and its trials, in the order of their submission; a single run is a sweep of one trial."""

    name: str
    metric: str
    mode: Literal["max", "min"]
    axes: tuple[str, ...]
    """Without the seed of confirmation."""
    bundle_axis: str | None
    settings: dict[str, Any]
    """Config path -> value, without what the axes set."""
    search: dict[str, Any]
    """`sweep.metric`, `sweep.scheduler.type`, ... -> value; `sweep.space.AXIS` -> the axis."""
    trials: tuple[TrialRecord, ...]
    run_dir: Path | None
    """Where its files are, if they are here."""
    tracking_uri: str | None
    """Of MLflow; None: the SQLite file beside the run directory."""
    chosen: str | None = None
    """Trial id, where a single trial was asked for."""

    @property
    def chosen_trials(self) -> tuple[TrialRecord, ...]:
        """The trial that was asked for, or all."""
        return tuple(t for t in self.trials if self.chosen in (None, t.trial_id))


# ---- public -------------------------------------------------------------------------------------------------------


def find_run_dir(name_or_path: str | Path, output_dir: str | Path = "runs") -> Path:
    """The run directory of a sweep, given as a path, by the sweep's name, or as a place in an object store.

    Args:
        name_or_path: a run directory; the `name` of a sweep whose directory is `<output_dir>/<name>`; or `storage` of a
            sweep's config and its name, `s3://bucket/sweeps/NAME`: then its files, without checkpoints, are brought to
            `<output_dir>/<name>`.
        output_dir: where sweeps were run.

    Raises:
        FileNotFoundError: there is no such sweep; lists the sweeps there with the nearest names.
        StorageError: the object store cannot be read.
    """
    if "://" in str(name_or_path):
        return sync.fetched(str(name_or_path), Path(output_dir))
    for candidate in (Path(name_or_path), Path(output_dir) / name_or_path):
        if _is_run_dir(candidate):
            return candidate
    raise FileNotFoundError(
        f"no sweep {str(name_or_path)!r}: neither a run directory nor a name in {Path(output_dir)}/ "
        f"({_near(name_or_path, output_dir)}); give the run directory, `<output_dir>/<name>`, or run the sweep first"
    )


def load_runs(
    name: str | Path,
    *,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    output_dir: str | Path = "runs",
) -> pd.DataFrame:
    """The trials of a sweep, one row each in the order of submission.

    ==================  =====================  ========================================================================
    column              dtype                  what
    ==================  =====================  ========================================================================
    trial_id            string                 `00000`, ...; `c00000`, ... of confirmation
    name                string                 its settings in short: `8m λ=0.1 lr=8.0e-04`
    sweep               string                 name of the sweep
    bundle              string                 label of the model size; "" without a bundle axis
    status              string                 finished, stopped_early, diverged, failed, unfinished
    purpose             string                 search, or confirm: a finalist with another seed
    steps               int64                  optimizer steps done
    attempts            int64                  how often training was begun; over 1 after a crash, 0 if never
    train_seconds       float64                of training; NaN where unknown
    loss.orpo_lambda    by its values          always these four, then the sweep's other axes by name (a bundle's are
    optim.lr                                   under its label); a trial's last where population-based training
    model.path                                 changed them
    train.seed
    eval/nll, ...       float64                of the last evaluation: those of `config.METRIC_MODES`, then others by
                                               name; NaN where missing or not finite
    mlflow_run_id       string                 missing until the sweep has ended, if read from its run directory
    checkpoint          string                 folder of the last one
    reused_from         string                 MLflow run whose result was taken over instead of training
    started             datetime64[ms, UTC]    when it was submitted, which is the start of its MLflow run
    ended               datetime64[ms, UTC]    NaT before its end
    ==================  =====================  ========================================================================

    Args:
        name: a run directory, the name of a sweep, one of its trials (`NAME/TRIAL_ID`, or its directory), or the id of
            an MLflow run, parent or child. For a trial there is one row.
        tracking_uri: of MLflow; by default MLFLOW_TRACKING_URI, else the SQLite file in `output_dir`. If this or
            `experiment` is given, MLflow is asked at once; else only where there is no run directory.
        experiment: of MLflow to look in; all by default. Of several sweeps of that name the newest is taken, with a
            warning in the log.
        output_dir: where sweeps were run.

    Raises:
        FileNotFoundError: no such sweep, trial or run; names the nearest.
        TrackingError: MLflow cannot be asked, or there is no such experiment.
    """
    return _frame(read_sweep(name, tracking_uri=tracking_uri, experiment=experiment, output_dir=output_dir))


def read_sweep(
    name: str | Path,
    *,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    output_dir: str | Path = "runs",
) -> SweepRecord:
    """The sweep itself; arguments and errors as of `load_runs`.

    Read from MLflow, it still has its `run_dir` if that lies in `output_dir`.
    """
    text = str(name)
    if tracking_uri is None and experiment is None:
        head, _, tail = text.rstrip("/").rpartition("/")
        head = head.removesuffix("/trials")  # a trial's directory
        for sweep, trial_id in ((text, None), (head, tail)):
            try:
                found = find_run_dir(sweep, output_dir) if sweep else None
            except FileNotFoundError:
                continue
            if found is not None:
                return _choose(_from_directory(found), trial_id)
    return _from_mlflow(text, tracking_uri, experiment, Path(output_dir).expanduser().absolute())


def compare_page(uri: str, run_ids: Sequence[str]) -> str:
    """Address of the page of the MLflow server at `uri` that shows these runs side by side.

    Raises:
        TrackingError: the server does not answer, or lacks one of the runs.
    """
    from orpo_ray.provenance import without_password

    with _asked(uri) as client:
        experiments = sorted({client.get_run(run_id).info.experiment_id for run_id in run_ids})
    listed = [quote(json.dumps(ids, separators=(",", ":"))) for ids in (list(run_ids), experiments)]
    return f"{without_password(uri).rstrip('/')}/#/compare-runs?runs={listed[0]}&experiments={listed[1]}"


# ---- from a run directory -----------------------------------------------------------------------------------------


def _is_run_dir(path: Path) -> bool:
    return any((path / file).is_file() for file in (SWEEP_FILE, RESULTS_FILE, EVENTS_FILE))


def _near(name: str | Path, output_dir: str | Path) -> str:
    known = sorted(path.name for path in Path(output_dir).glob("*") if _is_run_dir(path))
    return _nearest(str(name), known, "there is no sweep there")


def _nearest(name: str, known: list[str], none: str) -> str:
    near = difflib.get_close_matches(Path(name).name, known, n=3, cutoff=0.4) or known[:5]
    return f"the nearest names there: {', '.join(near)}" if near else none


def _choose(record: SweepRecord, trial_id: str | None) -> SweepRecord:
    """The record with this trial chosen.

    Raises:
        FileNotFoundError: it has no such trial.
    """
    if trial_id is not None and trial_id not in (known := [t.trial_id for t in record.trials]):
        raise FileNotFoundError(
            f"sweep {record.name} has no trial {trial_id!r}; {len(known)} trials"
            + (f", {known[0]} to {known[-1]}" if known else "")
        )
    return replace(record, chosen=trial_id)


def _from_directory(run_dir: Path) -> SweepRecord:
    results, events = current(run_dir), read_events(run_dir / EVENTS_FILE)
    tree = _config_of(run_dir)
    sweep = tree.get("sweep") or {}
    space = sweep.get("space", {})
    axes = sorted(space) if tree else sorted({name for t in results["trials"] for name in t["params"]} - {SEED})
    bundle_axis = next((name for name, axis in space.items() if axis["type"] == "bundle"), None)
    common = flat({section: value for section, value in tree.items() if section not in NOT_SETTINGS})
    facts: dict[str, dict[str, Any]] = {}
    submitted: dict[str, int] = {}
    ended: dict[str, int] = {}
    for event in events:
        trial_id = event["trial_id"]
        match event["event"]:
            case "submitted":
                submitted.setdefault(trial_id, event["time"])
            case "started":
                found = {key.replace("/", "."): value for key, value in event.get("facts", {}).items()}
                facts[trial_id] = found | facts.get(trial_id, {})  # MLflow keeps the first, too
            case "finished":
                ended[trial_id] = event["time"]
    labels = space[bundle_axis]["values"] if bundle_axis else {}
    trials = []
    for trial in results["trials"]:
        trial_id, params = trial["trial_id"], trial["params"]
        applied = labels.get(trial["bundle"], {}) | params
        trials.append(
            TrialRecord(
                trial_id=trial_id,
                bundle=trial["bundle"],
                purpose=trial.get("purpose", "search"),
                status="unfinished" if events and trial_id not in ended else trial["status"],
                params=_ordered(params),
                settings=_with_implied(common | applied, common, applied) | facts.get(trial_id, {}),
                steps=trial["steps"],
                attempts=trial["attempts"],
                train_seconds=trial["train_seconds"],
                metrics={key: _number(value) for key, value in trial["metrics"].items() if key.startswith("eval/")},
                checkpoint=trial["checkpoint"],
                mlflow_run_id=trial["mlflow_run_id"],
                reused_from=trial.get("reused_from"),
                submitted_ms=submitted.get(trial_id),
                ended_ms=ended.get(trial_id),
            )
        )
    swept = {*axes, *(path for settings in labels.values() for path in settings)}
    return SweepRecord(
        name=results["name"],
        metric=results["metric"],
        mode=results["mode"],
        axes=tuple(axes),
        bundle_axis=bundle_axis,
        settings={path: value for path, value in common.items() if path not in swept},
        search=flat({key: value for key, value in sweep.items() if key != "space"}, "sweep.")
        | {f"{_SPACE}{name}": axis for name, axis in space.items()},
        trials=tuple(trials),
        run_dir=run_dir.absolute(),
        tracking_uri=tree.get("tracking", {}).get("uri") or os.environ.get("MLFLOW_TRACKING_URI"),
    )


def _config_of(run_dir: Path) -> dict[str, Any]:
    """The dump in sweep.json with what `scaling: auto` became; empty where there is none.

    Not an ExperimentConfig: to look at a sweep, its config need not be one that this version would run.
    """
    file = run_dir / SWEEP_FILE
    if not file.is_file():
        return {}
    tree: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["config"]
    if (run_dir / FITTED_FILE).is_file():
        fitted = json.loads((run_dir / FITTED_FILE).read_text(encoding="utf-8"))
        bundles = [axis for axis in ((tree["sweep"] or {}).get("space", {})).values() if axis["type"] == "bundle"]
        for bundle in bundles:
            bundle["values"] = {label: fitted[label] | settings for label, settings in bundle["values"].items()}
        if not bundles:
            for path, value in fitted[""].items():
                section, _, key = path.partition(".")
                tree[section][key] = value
    return tree


def _with_implied(settings: dict[str, Any], common: dict[str, Any], applied: dict[str, Any]) -> dict[str, Any]:
    """The settings of a trial; where `loss.name` is an axis, with what its own implies in place of the file's."""
    if "loss.name" not in applied:
        return settings
    loss = {path.removeprefix("loss."): value for path, value in common.items() if path.startswith("loss.")}
    base = LossConfig(name=loss["name"], preset=loss["preset"]).model_dump(mode="json")
    given = {key: value for key, value in loss.items() if value != base[key]}
    given |= {path.removeprefix("loss."): value for path, value in applied.items() if path.startswith("loss.")}
    return settings | flat({"loss": LossConfig.model_validate(given).model_dump(mode="json")})


# ---- from MLflow --------------------------------------------------------------------------------------------------


@contextmanager
def _asked(uri: str) -> Iterator[MlflowClient]:
    """A client of the MLflow at `uri`, whose failures are told as TrackingError."""
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
            f"MLflow at {without_password(uri)} cannot be asked: {without_password(str(error))}\n"
            "Start the server, or correct --tracking-uri (or MLFLOW_TRACKING_URI)"
        ) from error


def _from_mlflow(name: str, tracking_uri: str | None, experiment: str | None, output_dir: Path) -> SweepRecord:
    from orpo_ray.provenance import without_password
    from orpo_ray.tracking.uri import resolve_uri

    uri = resolve_uri(tracking_uri, output_dir)
    file = Path(uri.partition(":///")[2]) if uri.startswith("sqlite") else None
    missing = (
        f"no sweep, trial or run {name!r}: neither a run directory, nor the name of a sweep in {output_dir} "
        f"({_near(name, output_dir)}), nor "
    )
    if file is not None and not file.exists():
        # Opening it would create it, with all its tables.
        raise FileNotFoundError(
            f"{missing}in MLflow, for there is no {file}; correct the name, or say where its MLflow is (tracking URI)"
        )
    with _asked(uri) as client:
        parent, trial_id = _find_parent(client, name, experiment)
        if parent is None:
            known = sorted({str(run.info.run_name) for run in _parents(client, _experiments(client, experiment))})
            near = _nearest(name, known, "there is no sweep there")
            raise FileNotFoundError(f"{missing}a name or a run id in MLflow at {without_password(uri)} ({near})")
        record = _parent_record(client, parent, uri, output_dir)
    return _choose(record, trial_id)


def _find_parent(client: MlflowClient, name: str, experiment: str | None) -> tuple[Run | None, str | None]:
    """The parent run, and the trial if one is named: by run id, by name, or as NAME/TRIAL_ID."""
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
    # Names cannot be escaped in a filter; those of sweeps have no quotes.
    if name is not None and "'" in name:
        return []
    where = "tags.`orpo_ray.sweep_id` LIKE '%'" + (f" AND attributes.run_name = '{name}'" if name else "")
    return _search(client, experiments, where, "attributes.start_time DESC")


def _search(client: MlflowClient, experiments: list[str], where: str, order: str) -> list[Run]:
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            experiments, filter_string=where, max_results=1000, order_by=[order], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _parent_record(client: MlflowClient, parent: Run, uri: str, output_dir: Path) -> SweepRecord:
    params = {key: _value(text) for key, text in parent.data.params.items()}
    space = {key.removeprefix(_SPACE): axis for key, axis in params.items() if key.startswith(_SPACE)}
    where = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = _search(client, [parent.info.experiment_id], where, "attributes.start_time ASC")
    if "sweep.metric" not in params:
        from orpo_ray.tracking.uri import TrackingError

        raise TrackingError(f"MLflow run {parent.info.run_id} is being written, and has no parameters yet; try again")
    # A run is made before its parameters are there: such a one has nothing to tell yet.
    children = [r for r in children if "orpo_ray.trial_id" in r.data.tags and {*space, SEED} <= r.data.params.keys()]
    children.sort(key=lambda run: (run.info.start_time, run.data.tags["orpo_ray.trial_id"]))
    bundle_axis = next((name for name, axis in space.items() if axis["type"] == "bundle"), None)
    name, metric = str(parent.info.run_name), params["sweep.metric"]
    run_dir = output_dir / name
    is_here = (run_dir / SWEEP_FILE).is_file() and json.loads((run_dir / SWEEP_FILE).read_text(encoding="utf-8"))[
        "sweep_id"
    ] == parent.data.tags["orpo_ray.sweep_id"]
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
        settings[name] = metrics.get(f"axes/{name}", _on_axis(axis, run.data.params[name]))  # a fork's, if it forked
    purpose = tags.get("orpo_ray.purpose", "search")
    params = {name: settings[name] for name in space} | ({SEED: settings[SEED]} if purpose == "confirm" else {})
    final = {key.removeprefix("final/"): value for key, value in metrics.items() if key.startswith("final/")}
    steps, seconds = final.pop("steps", None), final.pop("train_seconds", None)
    status = tags.get("orpo_ray.status", "unfinished")
    if status == "unfinished":
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
        params=_ordered(params),
        settings=settings,
        steps=int(steps or 0),
        attempts=int(tags.get("orpo_ray.retries", 0)) + 1 if "model.parameters" in settings else 0,
        train_seconds=None if seconds is None or math.isnan(seconds) else seconds,
        metrics={key: math.nan if abs(value) > _OVERFLOW else value for key, value in measured.items()},
        checkpoint=tags.get("orpo_ray.checkpoint"),
        mlflow_run_id=run.info.run_id,
        reused_from=tags.get("orpo_ray.reused_from"),
        submitted_ms=run.info.start_time,
        ended_ms=run.info.end_time if status != "unfinished" else None,
    )


def _value(text: str) -> Any:
    """What `settings.as_text` wrote."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _on_axis(axis: dict[str, Any], text: str) -> Any:
    """The candidate that MLflow holds as this text: a string that looks like a number stays one."""
    return next((c for c in axis.get("values", ()) if text in (c, json.dumps(c, ensure_ascii=False))), _value(text))


# ---- both ---------------------------------------------------------------------------------------------------------


def _ordered(params: dict[str, Any]) -> dict[str, Any]:
    """By name, the seed last: MLflow does not keep the file's order."""
    return {name: params[name] for name in sorted(params, key=lambda name: (name == SEED, name))}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _frame(record: SweepRecord) -> pd.DataFrame:
    import pandas as pd

    trials = record.chosen_trials
    text = {
        "trial_id": [t.trial_id for t in trials],
        "name": [describe(t.params) for t in trials],
        "sweep": [record.name for _ in trials],
        "bundle": [t.bundle for t in trials],
        "status": [t.status for t in trials],
        "purpose": [t.purpose for t in trials],
    }
    axes = [*ALWAYS_SHOWN, *(a for a in record.axes if a not in (*ALWAYS_SHOWN, record.bundle_axis))]
    others = sorted({key for t in record.trials for key in t.metrics} - METRIC_MODES.keys())
    links = {
        "mlflow_run_id": [t.mlflow_run_id for t in trials],
        "checkpoint": [t.checkpoint for t in trials],
        "reused_from": [t.reused_from for t in trials],
    }
    times = {"started": [t.submitted_ms for t in trials], "ended": [t.ended_ms for t in trials]}
    columns: dict[str, Any] = {key: pd.array(values, dtype="string") for key, values in text.items()}
    columns["steps"] = pd.array([t.steps for t in trials], dtype="int64")
    columns["attempts"] = pd.array([t.attempts for t in trials], dtype="int64")
    columns["train_seconds"] = pd.array([_number(t.train_seconds) for t in trials], dtype="float64")
    for axis in axes:
        values = [t.settings.get(axis) for t in trials]
        is_text = any(isinstance(v, str) for v in values) and all(isinstance(v, str | None) for v in values)
        columns[axis] = pd.Series(values, dtype="string" if is_text else None)
    for metric in (*METRIC_MODES, *others):
        columns[metric] = pd.array([t.metrics.get(metric, math.nan) for t in trials], dtype="float64")
    columns |= {key: pd.array(values, dtype="string") for key, values in links.items()}
    for key, stamps in times.items():
        columns[key] = pd.to_datetime(pd.Series(stamps, dtype="Int64"), unit="ms", utc=True).astype(
            "datetime64[ms, UTC]"
        )
    return pd.DataFrame(columns)
