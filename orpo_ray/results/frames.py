"""Data frames of a sweep's results, helpers for its axes and settings, and t-intervals of means over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from orpo_ray.config.space import describe
from orpo_ray.storage.events import Status
from orpo_ray.storage.sweep_state import SweepState

LAMBDA, LR, SEED = "loss.orpo_lambda", "optim.lr", "train.seed"


def load_runs_frame(results: dict[str, Any]) -> pd.DataFrame:
    """One row per trial, in the order of submission.

    Args:
        results: from `results.current` or `results.summarize`.

    Returns:
        Columns `trial_id`, `bundle`, `status`, `attempts`, `steps`, `train_seconds`, then the axes (`optim.lr`, ...)
        and the metrics of the last evaluation (`eval/nll`, ...); NaN where a trial has none.
    """
    fixed = ["trial_id", "bundle", "status", "attempts", "steps", "train_seconds"]
    rows = [{key: t[key] for key in fixed} | t["params"] | t["metrics"] for t in results["trials"]]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys([*fixed, *(key for row in rows for key in row)])))
    # Otherwise a column that holds only JSON nulls would not be numeric.
    return frame.astype({c: float for c in map(str, frame) if "/" in c or c == "train_seconds"})


def load_evaluations_frame(state: SweepState) -> pd.DataFrame:
    """One row per evaluation: `trial_id`, `step` and the held-out metrics; for a repeated step, the last one."""
    rows = [{"trial_id": e.trial_id, "step": e.step} | e.metrics for e in state.evaluations]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys(["trial_id", "step", *(key for row in rows for key in row)])))
    frame = frame.astype({column: float for column in map(str, frame) if "/" in column})
    return frame.drop_duplicates(["trial_id", "step"], keep="last")


def varied_axes(results: dict[str, Any]) -> list[str]:
    """Axes with more than one value among the trials, except the bundle axis."""
    trials = results["trials"]
    names = dict.fromkeys(name for trial in trials for name in trial["params"])
    values = {name: [trial["params"].get(name) for trial in trials] for name in names}
    bundles = [trial["bundle"] for trial in trials]
    return [name for name in names if values[name] != bundles and len({repr(v) for v in values[name]}) > 1]


def setting_of(params: dict[str, Any]) -> dict[str, Any]:
    """A trial's params without the seed; trials of one setting share them."""
    return {name: value for name, value in params.items() if name != SEED}


def setting_key(params: dict[str, Any]) -> str:
    """A key that identifies a setting by its exact values, whatever the order of its axes; its name is rounded."""
    return repr(sorted(setting_of(params).items()))


def by_setting(results: dict[str, Any], frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Rows grouped by setting, as (the setting's short name, rows), best mean first."""
    params = {t["trial_id"]: setting_of(t["params"]) for t in results["trials"]}
    groups = [g for _, g in frame.groupby(frame["trial_id"].map(lambda t: setting_key(params[t])), sort=False)]
    named = [(describe(params[group["trial_id"].iloc[0]]), group) for group in groups]
    return sorted(named, key=lambda item: item[1][results["metric"]].mean(), reverse=results["mode"] == "max")


def finished_rows(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Rows of the trials that finished with a value of the metric."""
    return frame[(frame["status"] == Status.FINISHED) & frame[metric].notna()] if metric in frame else frame[:0]


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95 % t-interval; the half-width is None for a single value."""
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return mean, None
    return mean, float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n))
