"""Held-out log-probabilities over training, and how far they change (the paper's Figures 3, 7, 8 and 9).

Shape suffixes: N pairs, B resamples. A last dimension of 2 holds chosen and rejected.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from orpo_ray.reproduction import tasks
from orpo_ray.reproduction.training import lambda_name
from orpo_ray.reproduction.workspace import Workspace
from orpo_ray.results.bootstrap import LEVEL, RESAMPLES, draws
from orpo_ray.storage.pair_scores import PAIRS_FILE, PairScores
from orpo_ray.storage.sweep_state import read_state

SIDES = ("chosen_logp", "rejected_logp")
_COMPARED = (
    ("probability less odds", "probability", "orpo"),
    ("orpo less sft", "orpo", "sft"),
    ("orpo-0.1 less sft", "orpo-0.1", "sft"),
)
"""Differences of two models' changes as (key in the results, model, model that is subtracted)."""


@dataclass(frozen=True, slots=True)
class Change:
    """Mean over held-out pairs, with a 95 % bootstrap interval; log-probabilities are in nats per token."""

    mean: float
    low: float
    high: float


def start(workspace: Workspace, console: Console) -> np.ndarray:
    """Mean token log-probabilities of the held-out pairs before training, float64 [N, 2]. Ray must be initialised."""
    return np.array(workspace.results_of([tasks.starting(workspace)], console)["start"])


def curves(workspace: Workspace, start_N2: np.ndarray) -> dict[str, list[dict[str, float]]]:
    """Model name -> mean held-out log-probabilities at every evaluation, starting with step 0."""
    start = dict(zip(SIDES, start_N2.mean(0).tolist(), strict=True))
    found = {}
    for name, (run_dir, trial_id) in _trials(workspace).items():
        points = [{"step": 0.0, **start}]
        for step, metrics in read_state(run_dir).trials[trial_id].metrics.items():
            sides = {side: metrics[f"eval/{side}"] for side in SIDES}
            points.append({"step": float(step), **sides, "log_odds": metrics["eval/log_odds"]})
        found[name] = points
    return found


def changes(workspace: Workspace, start_N2: np.ndarray) -> dict[str, dict[str, Any]]:
    """Changes from the start to the end of training, each as a `Change`.

    Returns:
        Model name -> side -> change; the differences between two models' changes (`_COMPARED`) in the same form; and
        `NAME's margin` -> `margin` -> change of chosen less that of rejected.
    """
    end = {name: PairScores.load(d / "trials" / t / PAIRS_FILE) for name, (d, t) in _trials(workspace).items()}
    moved = {
        name: {
            "chosen_logp": scores.chosen_logp_N - start_N2[:, 0],
            "rejected_logp": scores.rejected_logp_N - start_N2[:, 1],
        }
        for name, scores in end.items()
    }
    found = {name: {side: mean_interval(of_N) for side, of_N in sides.items()} for name, sides in moved.items()}
    # Subtracted pair by pair, so that the variation between pairs cancels.
    apart = {
        shown: {side: mean_interval(moved[one][side] - moved[other][side]) for side in SIDES}
        for shown, one, other in _COMPARED
        if one in moved and other in moved
    }
    margins_N = {name: sides["chosen_logp"] - sides["rejected_logp"] for name, sides in moved.items()}
    margins = {f"{name}'s margin": {"margin": mean_interval(of_N)} for name, of_N in margins_N.items()}
    if {"orpo", "orpo-0.1"} <= margins_N.keys():
        margins["orpo's margin less orpo-0.1's"] = {"margin": mean_interval(margins_N["orpo"] - margins_N["orpo-0.1"])}
    return found | apart | margins


def mean_interval(values_N: np.ndarray) -> dict[str, float]:
    """A `Change` as a dict: the mean of the values, with its bootstrap interval."""
    values_N = np.asarray(values_N, dtype=np.float64)
    drawn = [block_BN @ values_N / len(values_N) for block_BN in draws(len(values_N), RESAMPLES, 0)]
    low, high = np.quantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return dataclasses.asdict(Change(float(values_N.mean()), low, high))


def _trials(workspace: Workspace) -> dict[str, tuple[Path, str]]:
    """Model name -> (run directory, trial id), for SFT, ORPO and the probability ratio."""
    found = {}
    for role in ("lambda", "ratio"):
        run_dir = workspace.folder / role
        if not run_dir.exists():
            continue
        results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
        for trial in results["trials"]:
            name = "probability" if role == "ratio" else lambda_name(trial["params"]["loss.orpo_lambda"])
            found[name] = (run_dir, trial["trial_id"])
    return found
