"""Load sweeps by name, as records or as a table of trials.

A sweep reads the same from its run directory and from MLflow. pandas is imported only where it is used, because it is
slow to import.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_ray.config import METRIC_MODES, LossConfig
from orpo_ray.config.flatten import NOT_SETTINGS, flat
from orpo_ray.config.space import describe
from orpo_ray.files import read_json
from orpo_ray.storage.events import Status
from orpo_ray.storage.find import find_run_dir
from orpo_ray.storage.records import SEED, SPACE_PREFIX, SweepRecord, TrialRecord, choose, number, ordered
from orpo_ray.storage.results import current
from orpo_ray.storage.run_dir import FITTED_FILE, SWEEP_FILE
from orpo_ray.storage.sweep_state import read_state
from orpo_ray.tracking.read_runs import from_mlflow

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

ALWAYS_SHOWN = ("loss.orpo_lambda", "optim.lr", "model.path", SEED)
"""Settings that are columns of every table, swept or not, so that tables of several sweeps can be concatenated."""


# ---- public -------------------------------------------------------------------------------------------------------


def load_runs(
    name: str | Path,
    *,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    output_dir: str | Path = "runs",
) -> pd.DataFrame:
    """The trials of a sweep, one row each in the order of submission.

    ==================  =====================  ========================================================================
    column              dtype                  meaning
    ==================  =====================  ========================================================================
    trial_id            string                 `00000`, ...; `c00000`, ... for confirmation trials
    name                string                 its settings in short: `8m λ=0.1 lr=8.0e-04`
    sweep               string                 name of the sweep
    bundle              string                 label of the model size; "" without a bundle axis
    status              string                 finished, stopped_early, diverged, failed, unfinished
    purpose             string                 search, or confirm: a finalist with another seed
    steps               int64                  optimizer steps done
    attempts            int64                  how often training was begun; over 1 after a crash, 0 if never
    train_seconds       float64                training time; NaN where unknown
    loss.orpo_lambda    by its values          always these four, then the sweep's other axes by name (a bundle's are
    optim.lr                                   under its label); the last values where population-based training
    model.path                                 changed them
    train.seed
    eval/nll, ...       float64                of the last evaluation: those of `config.METRIC_MODES`, then others by
                                               name; NaN where missing or not finite
    mlflow_run_id       string                 missing until the sweep has ended, if read from its run directory
    checkpoint          string                 folder of the last checkpoint
    reused_from         string                 MLflow run whose result was taken over instead of training
    started             datetime64[ms, UTC]    time of submission, which is the start of its MLflow run
    ended               datetime64[ms, UTC]    NaT before its end
    ==================  =====================  ========================================================================

    Args:
        name: a run directory, the name of a sweep, one of its trials (`NAME/TRIAL_ID`, or its directory), or the id of
            an MLflow run, parent or child. A trial gives one row.
        tracking_uri: MLflow tracking URI; by default MLFLOW_TRACKING_URI, else the SQLite file in `output_dir`. If this
            or `experiment` is given, the sweep is read from MLflow; else only where there is no run directory.
        experiment: MLflow experiment to search; all by default. Of several sweeps with that name the newest is taken,
            with a warning in the log.
        output_dir: parent of the run directories.

    Raises:
        FileNotFoundError: there is no such sweep, trial or run; the message names the nearest.
        TrackingError: MLflow does not answer, or there is no such experiment.
    """
    return _frame(read_sweep(name, tracking_uri=tracking_uri, experiment=experiment, output_dir=output_dir))


def read_sweep(
    name: str | Path,
    *,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    output_dir: str | Path = "runs",
) -> SweepRecord:
    """The sweep as a record; arguments and errors as in `load_runs`.

    A sweep read from MLflow still has its `run_dir` if that lies in `output_dir`.
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
                return choose(_from_directory(found), trial_id)
    return from_mlflow(text, tracking_uri, experiment, Path(output_dir).expanduser().absolute())


# ---- from a run directory -----------------------------------------------------------------------------------------


def _from_directory(run_dir: Path) -> SweepRecord:
    results, state = current(run_dir), read_state(run_dir)
    tree = _config_of(run_dir)
    sweep = tree.get("sweep") or {}
    space = sweep.get("space", {})
    axes = sorted(space) if tree else sorted({name for t in results["trials"] for name in t["params"]} - {SEED})
    bundle_axis = next((name for name, axis in space.items() if axis["type"] == "bundle"), None)
    common = flat({section: value for section, value in tree.items() if section not in NOT_SETTINGS})
    labels = space[bundle_axis]["values"] if bundle_axis else {}
    trials = []
    for trial in results["trials"]:
        trial_id, params = trial["trial_id"], trial["params"]
        known = state.trials.get(trial_id)
        facts = {} if known is None else {key.replace("/", "."): value for key, value in known.facts.items()}
        applied = labels.get(trial["bundle"], {}) | params
        trials.append(
            TrialRecord(
                trial_id=trial_id,
                bundle=trial["bundle"],
                purpose=trial.get("purpose", "search"),
                status=Status.UNFINISHED if state.trials and not (known and known.end) else Status(trial["status"]),
                params=ordered(params),
                settings=_with_implied(common | applied, common, applied) | facts,
                steps=trial["steps"],
                attempts=trial["attempts"],
                train_seconds=trial["train_seconds"],
                metrics={key: number(value) for key, value in trial["metrics"].items() if key.startswith("eval/")},
                checkpoint=trial["checkpoint"],
                mlflow_run_id=trial["mlflow_run_id"],
                reused_from=trial.get("reused_from"),
                submitted_ms=known.submitted_ms if known else None,
                ended_ms=known.end.time if known and known.end else None,
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
        | {f"{SPACE_PREFIX}{name}": axis for name, axis in space.items()},
        trials=tuple(trials),
        run_dir=run_dir.absolute(),
        tracking_uri=tree.get("tracking", {}).get("uri") or os.environ.get("MLFLOW_TRACKING_URI"),
    )


def _config_of(run_dir: Path) -> dict[str, Any]:
    """The config in sweep.json with the values chosen for `scaling: auto`; empty without that file.

    Not parsed as an ExperimentConfig, so that sweeps whose config this version no longer accepts can still be read.
    """
    file = run_dir / SWEEP_FILE
    if not file.is_file():
        return {}
    tree: dict[str, Any] = read_json(file)["config"]
    if (run_dir / FITTED_FILE).is_file():
        fitted = read_json(run_dir / FITTED_FILE)
        bundles = [axis for axis in ((tree["sweep"] or {}).get("space", {})).values() if axis["type"] == "bundle"]
        for bundle in bundles:
            bundle["values"] = {label: fitted[label] | settings for label, settings in bundle["values"].items()}
        if not bundles:
            for path, value in fitted[""].items():
                section, _, key = path.partition(".")
                tree[section][key] = value
    return tree


def _with_implied(settings: dict[str, Any], common: dict[str, Any], applied: dict[str, Any]) -> dict[str, Any]:
    """The settings of a trial; where `loss.name` is an axis, with the defaults of the trial's loss, not the file's."""
    if "loss.name" not in applied:
        return settings
    loss = {path.removeprefix("loss."): value for path, value in common.items() if path.startswith("loss.")}
    base = LossConfig(name=loss["name"], preset=loss["preset"]).model_dump(mode="json")
    given = {key: value for key, value in loss.items() if value != base[key]}
    given |= {path.removeprefix("loss."): value for path, value in applied.items() if path.startswith("loss.")}
    return settings | flat({"loss": LossConfig.model_validate(given).model_dump(mode="json")})


# ---- as a table ---------------------------------------------------------------------------------------------------


def _frame(record: SweepRecord) -> pd.DataFrame:
    import pandas as pd

    trials = record.chosen_trials
    text = {
        "trial_id": [t.trial_id for t in trials],
        "name": [describe(t.params) for t in trials],
        "sweep": [record.name for _ in trials],
        "bundle": [t.bundle for t in trials],
        "status": [t.status.value for t in trials],
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
    columns["train_seconds"] = pd.array([number(t.train_seconds) for t in trials], dtype="float64")
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
