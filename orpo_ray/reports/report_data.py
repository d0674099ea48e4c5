"""Input data of a report, and the order and words that its sections share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from orpo_ray.formatting import ended_as
from orpo_ray.results.frames import load_evaluations_frame, load_runs_frame
from orpo_ray.results.winners import summarize_winners
from orpo_ray.storage.events import Status
from orpo_ray.storage.results import current
from orpo_ray.storage.sweep_state import SweepState, read_state

STATUS_ORDER = (Status.FINISHED, Status.UNFINISHED, Status.STOPPED_EARLY, Status.DIVERGED, Status.FAILED)


@dataclass(frozen=True, slots=True, eq=False)
class ReportData:
    """A sweep as its report reads it."""

    run_dir: Path
    results: dict[str, Any]
    """As `results.current` gives them, with `winners`."""
    state: SweepState
    """The sweep as its journal tells it."""
    frame: pd.DataFrame
    """One row per trial, from `frames.load_runs_frame`."""
    evaluations: pd.DataFrame
    """One row per evaluation, from `frames.load_evaluations_frame`."""

    @classmethod
    def load(cls, run_dir: Path) -> ReportData:
        """Read the results and the journal of a sweep that has ended or is under way.

        Raises:
            FileNotFoundError: no sweep has run in run_dir.
        """
        results = current(run_dir)
        if "winners" not in results:  # the sweep is under way, or was run before results had winners
            results["winners"] = summarize_winners(results, run_dir)
        state = read_state(run_dir)
        return cls(run_dir, results, state, load_runs_frame(results), load_evaluations_frame(state))


def ranked(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Trials by status (`STATUS_ORDER`), then the best first; trials without a value come last in their status."""
    sign = -1.0 if results["mode"] == "max" else 1.0

    def key(trial: dict[str, Any]) -> tuple[int, float]:
        value = trial["metrics"].get(results["metric"])
        return STATUS_ORDER.index(trial["status"]), math.inf if value is None else sign * value

    return sorted(results["trials"], key=key)


def best_trial(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The best run of the best setting; where no setting is judged, the best trial."""
    if (setting := results.get("winners", {}).get("best")) is None:
        return results["best"]
    best: dict[str, Any] = next(t for t in results["trials"] if t["trial_id"] == setting["trial_id"])
    return best


def count_statuses(trials: Iterable[Mapping[str, Any]], but: str = "") -> str:
    """How many trials have each status, except `but`: `12 finished, 1 diverged`."""
    statuses = [trial["status"] for trial in trials]
    return ended_as({status: statuses.count(status) for status in STATUS_ORDER if status != but})


def reason(trial: Mapping[str, Any]) -> str:
    """The trial's error in one line: the last line of a traceback, else the first line."""
    lines = (trial["error"] or "").strip().splitlines()
    text = lines[-1] if lines and lines[0].startswith("Traceback") else lines[0] if lines else ""
    return text if len(text) <= 160 else text[:157] + "..."


def model_sizes(data: ReportData) -> list[dict[str, Any]]:
    """Throughput and cost of each model size, in the order of submission; None where the journal does not tell."""
    rows = []
    for bundle in dict.fromkeys(trial["bundle"] for trial in data.results["trials"]):
        own = [trial for trial in data.state.trials.values() if trial.bundle == bundle]
        speeds = [speed for trial in own for speed in trial.tokens_per_second]
        peaks = [trial.peak_memory_gib for trial in own if trial.peak_memory_gib is not None]
        steps = [trial["steps"] for trial in data.results["trials"] if trial["bundle"] == bundle]
        rows.append(
            {
                "bundle": bundle,
                "parameters": data.state.parameters.get(bundle),
                "trials": len(steps),
                "devices": max((trial.devices for trial in own), default=None),
                "tokens_per_second": median(speeds) if speeds else None,
                "peak_memory_gib": max(peaks, default=None),
                "steps": sum(steps),
                "device_seconds": sum(trial.device_seconds for trial in own),
            }
        )
    return rows
