"""Convert a sweep's state, read from its journal (events.jsonl), to its results (results.json)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from orpo_ray.config import METRIC_MODES
from orpo_ray.errors import NoSuchRunError
from orpo_ray.files import read_json
from orpo_ray.storage.events import Status
from orpo_ray.storage.run_dir import EVENTS_FILE, RESULTS_FILE, SWEEP_FILE, finite
from orpo_ray.storage.sweep_state import SweepState, TrialState, read_state

_NO_END = "did not finish"


def summarize(
    name: str,
    metric: str,
    mode: Literal["max", "min"],
    state: SweepState,
    mlflow_run_ids: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        name: of the sweep.
        metric: name of a held-out metric; `best` is the trial with its best value.
        mode: whether `max` or `min` is better.
        state: the sweep, folded from its journal.
        mlflow_run_ids: trial id -> MLflow run id.

    Returns:
        `name`, `metric`, `mode`, `best` and `trials` in the order of submission. A trial has `trial_id`, `bundle`,
        `params`, `purpose` (`search`, or `confirm`: a finalist with another seed), `status` (finished, stopped_early,
        diverged or failed), `attempts`, `steps`, `metrics` (of its last evaluation; null where not finite),
        `checkpoint`, `mlflow_run_id`, `train_seconds` (null where unknown), `error`, `forks` (of population-based
        training: `step`, `donor` and the `params` it continued with; `params` are its latest) and
        `reused_from` (the MLflow run whose result was used instead of training, or null). `best` is a finished trial,
        or one stopped early if none finished, or null: never a diverged or failed one, however good its last evaluation
        was.

    Raises:
        ValueError: mode is neither max nor min.
    """
    if mode not in ("max", "min"):
        raise ValueError(f"mode must be max or min, got {mode!r}")
    run_ids = mlflow_run_ids or {}
    trials = [finite(_row(trial, run_ids.get(trial.trial_id))) for trial in state.trials.values()]
    return {"name": name, "metric": metric, "mode": mode, "best": _best(trials, metric, mode), "trials": trials}


def load_results(run_dir: str | Path) -> dict[str, Any]:
    """Read results.json of a run directory.

    Raises:
        NoSuchRunError: there is none; the message says whether the sweep has begun.
    """
    path = Path(run_dir) / RESULTS_FILE
    if not path.is_file():
        begun = (Path(run_dir) / EVENTS_FILE).exists()
        why = (
            "the sweep was begun but has not ended: run the same command again to finish it"
            if begun
            else "no sweep has run here: is it the run directory, `<output_dir>/<name>`?"
        )
        raise NoSuchRunError(f"{path}: no such file; {why}")
    results: dict[str, Any] = read_json(path)
    return results


def current(run_dir: str | Path) -> dict[str, Any]:
    """Results of a sweep that has ended; otherwise its results so far, from the journal.

    Returns:
        As `summarize`. Without an end of the sweep, a trial without an end has status `unfinished` and no `error`, and
        MLflow run ids are null.

    Raises:
        NoSuchRunError: no sweep has run here.
        DamagedFileError: one of its files cannot be read.
    """
    run_dir = Path(run_dir)
    if not is_open(run_dir):
        return load_results(run_dir)
    # Read the plain JSON, not an ExperimentConfig: this version may not accept the config of an older sweep.
    config = read_json(run_dir / SWEEP_FILE)["config"]
    metric = config["sweep"]["metric"]
    state = read_state(run_dir)
    results = summarize(config["name"], metric, METRIC_MODES[metric], state)
    for trial in results["trials"]:
        if not state.trials[trial["trial_id"]].status.has_ended:
            trial |= {"status": Status.UNFINISHED.value, "error": None}
    return results


def is_open(run_dir: Path) -> bool:
    """Whether a sweep has begun here and has no results yet, or has continued since they were written."""
    results, journal = run_dir / RESULTS_FILE, run_dir / EVENTS_FILE
    if not (run_dir / SWEEP_FILE).is_file():
        return False
    # An interrupted sweep has results; when it is continued, its journal becomes newer than them.
    return not results.exists() or (journal.exists() and journal.stat().st_mtime_ns > results.stat().st_mtime_ns)


def _row(trial: TrialState, mlflow_run_id: str | None) -> dict[str, Any]:
    end = trial.end
    return {
        "trial_id": trial.trial_id,
        "bundle": trial.bundle,
        "params": trial.params,
        "purpose": trial.purpose,
        "status": (end.status if end else Status.FAILED).value,
        "attempts": len({start.attempt for start in trial.starts}),
        "forks": [{"step": fork.step, "donor": fork.donor, "params": fork.params} for fork in trial.forks],
        "reused_from": trial.reused_from,
        "steps": end.steps if end else trial.furthest_step,
        "metrics": end.metrics if end else trial.last_metrics,
        "checkpoint": trial.checkpoint,
        "mlflow_run_id": mlflow_run_id,
        "train_seconds": end.train_seconds if end else None,
        "error": end.error if end else _NO_END,
    }


def _best(trials: list[dict[str, Any]], metric: str, mode: str) -> dict[str, Any] | None:
    for status in (Status.FINISHED, Status.STOPPED_EARLY):
        candidates = [t for t in trials if t["status"] == status and t["metrics"].get(metric) is not None]
        if candidates:
            better = max if mode == "max" else min
            return better(candidates, key=lambda trial: trial["metrics"][metric])  # ties: the first submitted
    return None
