"""What a fault cost: a disturbed sweep's journal, results and MLflow runs against those of an undisturbed one."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tests.support.real_sweeps import Sweeps

RELATIVE = 1.0e-5
"""How far a loss may be from that of the undisturbed sweep."""

_STATUS = {"finished": "FINISHED", "stopped_early": "KILLED", "diverged": "FAILED", "failed": "FAILED"}


@dataclass(frozen=True, slots=True)
class Left:
    """What a sweep leaves."""

    trials: dict[str, dict[str, Any]]
    """As in results.json, by their settings: ids may be given in another order."""
    losses: dict[str, dict[int, float]]
    """Settings -> step -> train/loss, of the journal."""
    points: dict[str, Counter[tuple[str, int]]]
    """Settings -> how often MLflow has (metric, step)."""
    statuses: dict[str, str]
    """Settings -> status of the MLflow run."""
    runs: int
    """Runs of trials in MLflow."""
    events: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Damage:
    """The difference."""

    trials_lost: int
    """Trials that are not there, there twice, or ended otherwise than undisturbed."""
    points_missing: int
    points_twice: int
    statuses_wrong: int
    """MLflow runs that do not say how their trial ended."""
    loss_difference: float
    """The largest relative one over all steps of all trials, and of the final metrics."""
    steps_lost: int
    """Done, and gone, over all trials: their training loss is nowhere."""
    steps_again: int
    """Optimizer steps trained more than once."""
    continued_from: tuple[int, ...]
    """The step of each checkpoint that a trial went on from, in order."""
    seconds_away: float | None
    """From the fault until training went on; None where it never stopped, or for want of a moment."""

    @property
    def is_none(self) -> bool:
        """Nothing is lost; work done again is no loss."""
        whole = self.trials_lost + self.points_missing + self.points_twice + self.statuses_wrong + self.steps_lost
        return whole == 0 and self.loss_difference <= RELATIVE

    def as_json(self) -> dict[str, Any]:
        """For a results file."""
        return asdict(self) | {"is_none": self.is_none}


def left_by(sweeps: Sweeps, name: str, database: Path | None = None) -> Left:
    """Read what a sweep left.

    Args:
        sweeps: where it ran.
        name: the sweep's.
        database: MLflow's SQLite file, if it is not the one in `output_dir`.
    """
    results, events = sweeps.results(name), sweeps.events(name)
    of_trial = {t["trial_id"]: _key(t["params"]) for t in results["trials"]}
    losses: dict[str, dict[int, float]] = {key: {} for key in of_trial.values()}
    for event in events:
        if event["event"] == "log":
            losses[of_trial[event["trial_id"]]][event["step"]] = event["metrics"]["train/loss"]
    points: dict[str, Counter[tuple[str, int]]] = {key: Counter() for key in of_trial.values()}
    statuses, runs = {}, 0
    with sqlite3.connect(f"file:{database or sweeps.folder / 'runs' / 'mlflow.db'}?mode=ro", uri=True) as connection:
        (sweep_id,) = _sweep_ids(connection, name)
        for run, trial_id, status in connection.execute(
            "SELECT r.run_uuid, t.value, r.status FROM runs r "
            "JOIN tags p ON p.run_uuid = r.run_uuid AND p.key = 'mlflow.parentRunId' AND p.value = ? "
            "JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = 'orpo_ray.trial_id'",
            (sweep_id,),
        ):
            runs += 1
            statuses[of_trial[trial_id]] = status
            rows = connection.execute("SELECT key, step FROM metrics WHERE run_uuid = ?", (run,))
            points[of_trial[trial_id]].update(rows.fetchall())
    trials = {_key(t["params"]): t for t in results["trials"]}
    return Left(trials, losses, points, statuses, runs, events)


def without(left: Left, key: str) -> Left:
    """Without a trial, by its settings; the number of runs says that it is not looked for."""
    parts = {f.name: {k: v for k, v in getattr(left, f.name).items() if k != key} for f in fields(left)[:4]}
    return replace(left, **parts, runs=left.runs - 1)


def damage(whole: Left, disturbed: Left, when: Sequence[float] = (), clock_jumped: bool = False) -> Damage:
    """Compare.

    Args:
        whole: of the undisturbed sweep.
        disturbed: of the other.
        when: the faults' moments, in seconds since the epoch.
        clock_jumped: the journal's times mean nothing.
    """
    ends_differ = sum(
        disturbed.trials.get(key, {}).get("status") != trial["status"]
        or disturbed.trials[key]["steps"] != trial["steps"]
        for key, trial in whole.trials.items()
    )
    surplus = len(disturbed.trials.keys() - whole.trials.keys()) + max(0, disturbed.runs - len(whole.trials))
    differences = [0.0]
    for key, steps in whole.losses.items():
        theirs = disturbed.losses.get(key, {})
        differences += [abs(theirs[step] / loss - 1) for step, loss in steps.items() if step in theirs]
        metrics = disturbed.trials.get(key, {}).get("metrics", {})
        differences += [
            abs(metrics[name] - value) / max(abs(value), 1e-3)
            for name, value in whole.trials[key]["metrics"].items()
            if name in metrics
        ]
    starts = _starts(disturbed.events)
    return Damage(
        trials_lost=ends_differ + surplus,
        points_missing=sum(
            len(points.keys() - disturbed.points.get(k, {}).keys()) for k, points in whole.points.items()
        ),
        points_twice=sum(count - 1 for points in disturbed.points.values() for count in points.values()),
        statuses_wrong=sum(
            disturbed.statuses.get(key) != _STATUS[trial["status"]] for key, trial in disturbed.trials.items()
        ),
        loss_difference=max(differences),
        steps_lost=sum(len(steps.keys() - disturbed.losses.get(k, {}).keys()) for k, steps in whole.losses.items()),
        steps_again=sum(max(0, reached - step) for step, reached in starts),
        continued_from=tuple(step for step, _ in starts),
        seconds_away=None if clock_jumped else max((_away(disturbed.events, moment) for moment in when), default=None),
    )


def _key(params: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(params.items()))


def _sweep_ids(connection: sqlite3.Connection, name: str) -> list[str]:
    """Run ids of the parent runs of a name."""
    rows = connection.execute(
        "SELECT r.run_uuid FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = 'orpo_ray.sweep_id' "
        "WHERE r.name = ? AND NOT EXISTS "
        "(SELECT 1 FROM tags p WHERE p.run_uuid = r.run_uuid AND p.key = 'mlflow.parentRunId')",
        (name,),
    )
    return [run for (run,) in rows]


def _starts(events: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """(step it started from, step it had been at) of every start of a trial after its first."""
    reached: dict[str, int] = {}
    starts = []
    for event in events:
        trial = event["trial_id"]
        match event["event"]:
            case "started":
                if trial in reached:
                    starts.append((event["step"], reached[trial]))
                reached[trial] = event["step"]
            case "log":
                reached[trial] = max(reached[trial], event["step"])
    return starts


def _away(events: Sequence[dict[str, Any]], moment: float) -> float:
    """Seconds until a trial started again, or, where none did, until the next step was done."""
    later = [(e["event"], e["time"] / 1000 - moment) for e in events if e["time"] / 1000 >= moment]
    for kind in ("started", "log", "eval", "finished"):
        if found := next((seconds for event, seconds in later if event == kind), None):
            return found
    return 0.0
