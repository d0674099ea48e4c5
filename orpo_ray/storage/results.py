"""From the journal of a sweep (events.jsonl) to its results (results.json)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from orpo_ray.config import METRIC_MODES
from orpo_ray.errors import NoSuchRunError
from orpo_ray.files import read_json
from orpo_ray.storage.journal import read_events
from orpo_ray.storage.run_dir import EVENTS_FILE, RESULTS_FILE, SWEEP_FILE, finite

_NO_END = "did not finish"


def summarize(
    name: str,
    metric: str,
    mode: Literal["max", "min"],
    events: Iterable[dict[str, Any]],
    mlflow_run_ids: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        name: of the sweep.
        metric: key of a held-out metric; `best` is the trial with its best value.
        mode: whether `max` or `min` is better.
        events: the journal, in order.
        mlflow_run_ids: trial id -> MLflow run id.

    Returns:
        `name`, `metric`, `mode`, `best` and `trials` in the order of submission. A trial has `trial_id`, `bundle`,
        `params`, `purpose` (`search`, or `confirm`: a finalist with another seed), `status` (finished, stopped_early,
        diverged or failed), `attempts`, `steps`, `metrics` (of its last evaluation; null where not finite),
        `checkpoint`, `mlflow_run_id`, `train_seconds` (null where unknown), `error`, `forks` (of population-based
        training: `step`, `donor` and the `params` it went on with; `params` are its last) and `reused_from` (the MLflow
        run whose result was taken over instead of training, or null). `best` is a finished trial, or
        one stopped early if none finished, or null: never a diverged or failed one, however good its last evaluation
        was.

    Raises:
        ValueError: mode is neither max nor min, or an event precedes the submission of its trial.
    """
    if mode not in ("max", "min"):
        raise ValueError(f"mode must be max or min, got {mode!r}")
    trials: dict[str, dict[str, Any]] = {}
    attempts: dict[str, set[int]] = {}
    for event in events:
        trial_id = event["trial_id"]
        if event["event"] == "submitted":
            trials.setdefault(trial_id, _submitted(event, (mlflow_run_ids or {}).get(trial_id)))
            attempts.setdefault(trial_id, set())
            continue
        if trial_id not in trials:
            raise ValueError(f"event {event['event']!r} of trial {trial_id} comes before its submission")
        trial = trials[trial_id]
        match event["event"]:
            case "started":
                # A pause and a resume share an attempt; a restart after a crash counts as another.
                attempts[trial_id].add(event["attempt"])
                trial["steps"] = max(trial["steps"], event["step"])
            case "log":
                trial["steps"] = max(trial["steps"], event["step"])
            case "eval":
                trial["steps"] = max(trial["steps"], event["step"])
                trial["metrics"] = event["metrics"]
                trial["checkpoint"] = event["checkpoint"] or trial["checkpoint"]
            case "forked":
                trial["forks"].append({key: event[key] for key in ("step", "donor", "params")})
                trial["params"], trial["steps"] = event["params"], event["step"]
                trial["metrics"], trial["checkpoint"] = trials[event["donor"]]["metrics"], None
            case "finished":
                trial["reused_from"] = event.get("reused_from")
                trial.update(
                    {k: event[k] for k in ("status", "steps", "metrics", "checkpoint", "train_seconds", "error")}
                )
    for trial_id, trial in trials.items():
        trial["attempts"] = len(attempts[trial_id])
    ordered = [finite(trial) for trial in trials.values()]
    return {"name": name, "metric": metric, "mode": mode, "best": _best(ordered, metric, mode), "trials": ordered}


def load_results(run_dir: str | Path) -> dict[str, Any]:
    """Read results.json of a run directory.

    Raises:
        NoSuchRunError: there is none; says whether the sweep has begun.
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
    """Results of a sweep that has ended; else what its journal tells so far, whether it is under way or was killed.

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
    # The dump, not an ExperimentConfig: to look at a sweep, its config need not be one that this version would run.
    config = read_json(run_dir / SWEEP_FILE)["config"]
    metric = config["sweep"]["metric"]
    results = summarize(config["name"], metric, METRIC_MODES[metric], read_events(run_dir / EVENTS_FILE))
    for trial in results["trials"]:
        if trial["error"] == _NO_END:
            trial |= {"status": "unfinished", "error": None}
    return results


def is_open(run_dir: Path) -> bool:
    """Whether a sweep has begun here, and has gone on since its results were written if they were."""
    results, journal = run_dir / RESULTS_FILE, run_dir / EVENTS_FILE
    if not (run_dir / SWEEP_FILE).is_file():
        return False
    # An interrupted sweep has results; when it is continued, its journal outlives them.
    return not results.exists() or (journal.exists() and journal.stat().st_mtime_ns > results.stat().st_mtime_ns)


def _submitted(event: dict[str, Any], mlflow_run_id: str | None) -> dict[str, Any]:
    return {
        "trial_id": event["trial_id"],
        "bundle": event["bundle"],
        "params": event["params"],
        "purpose": event.get("purpose", "search"),  # journals of before there was another
        "status": "failed",  # until its finished event says otherwise
        "attempts": 0,
        "forks": [],
        "reused_from": None,
        "steps": 0,
        "metrics": {},
        "checkpoint": None,
        "mlflow_run_id": mlflow_run_id,
        "train_seconds": None,
        "error": _NO_END,
    }


def _best(trials: list[dict[str, Any]], metric: str, mode: str) -> dict[str, Any] | None:
    for status in ("finished", "stopped_early"):
        candidates = [t for t in trials if t["status"] == status and t["metrics"].get(metric) is not None]
        if candidates:
            better = max if mode == "max" else min
            return better(candidates, key=lambda trial: trial["metrics"][metric])  # ties: the first submitted
    return None
