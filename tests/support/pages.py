"""A made-up sweep of several model sizes as it lies on disk: journal, results, per-pair scores, generations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from orpo_ray.config import METRIC_MODES, parse
from orpo_ray.reports.report_data import ReportData
from orpo_ray.results.frames import load_evaluations_frame, load_runs_frame
from orpo_ray.results.winners import summarize_winners
from orpo_ray.storage.results import summarize
from orpo_ray.storage.run_dir import write_results
from orpo_ray.storage.sweep_state import SweepState
from tests.support.events import as_state
from tests.support.sweeps import pair_scores, trial, write_pairs

METRIC = "eval/preference_accuracy"
SIZES = {"1m": 922_752, "4m": 4_198_656, "16m": 16_785_408}
LAMBDAS = (0.0, 0.1, 0.25, 0.5, 1.0)
_MAX_STEPS, _EVERY = 200, 10


def config_tree(name: str) -> dict[str, Any]:
    """Config of the sweep as `sweep.json` holds it: λ × lr × size × seed."""
    bundles = {size: {"model.path": f"tiny-llama-{size}"} for size in SIZES}
    bundles["16m"] |= {"scaling.num_workers": 2}
    space = {
        "loss.orpo_lambda": {"type": "grid", "values": [*LAMBDAS]},
        "optim.lr": {"type": "loguniform", "low": 1e-4, "high": 1e-2},
        "train.seed": {"type": "grid", "values": [1, 2]},
        "model": {"type": "bundle", "values": bundles},
    }
    tree = {
        "name": name,
        "model": {"path": "tiny-llama-1m"},
        "data": {"path": "builtin://style-pairs"},
        "train": {"max_steps": _MAX_STEPS, "eval_every": _EVERY},
        "sweep": {"metric": METRIC, "space": space},
    }
    return parse(tree).model_dump(mode="json")


def write_sweep(run_dir: Path, num_trials: int, num_pairs: int = 96) -> dict[str, Any]:
    """Write a sweep in which the best lr falls with size and high lr × λ diverges; every eighth is stopped early.

    Returns:
        The results, with `winners`.
    """
    rng = np.random.default_rng(0)
    pair_N = rng.normal(size=num_pairs)
    events: list[dict[str, Any]] = []
    clock = 1_700_000_000_000
    own_N, lr = np.zeros(num_pairs), 1e-3
    for number in range(num_trials):
        size = [*SIZES][number // 2 % 3]
        lam, seed, trial_id = LAMBDAS[number // 6 % 5], 1 + number % 2, f"{number:05d}"
        if number % 2 == 0:  # two seeds of each setting
            lr, own_N = float(10 ** rng.uniform(-4, -2)), 0.2 * rng.normal(size=num_pairs)
        params = {"loss.orpo_lambda": lam, "optim.lr": lr, "train.seed": seed, "model": size}
        width = math.log10(SIZES[size] / 1e6)
        goodness = 1 - 0.8 * abs(math.log10(lr) + 2.7 + 0.4 * width) + 0.2 * width - (lam - 0.3) ** 2
        status = "diverged" if lr * (1 + lam) > 8e-3 else "stopped_early" if number % 16 == 6 else "finished"
        if number % 101 == 50:
            status = "failed"
        last = {"finished": _MAX_STEPS, "stopped_early": 60, "diverged": 40, "failed": 20}[status]

        def add(event: str, trial_id: str = trial_id, **details: Any) -> None:
            nonlocal clock
            clock += 500
            events.append({"event": event, "trial_id": trial_id, **details, "time": clock})

        devices = 2 if size == "16m" else 1
        add("submitted", params=params, bundle=size, purpose="search")
        facts = {"model/parameters": SIZES[size]}
        add("started", attempt=0, group="g", devices=devices, step=0, max_steps=_MAX_STEPS, facts=facts)
        metrics: dict[str, float] = {}
        for step in range(_EVERY, last + 1, _EVERY):
            done = 1 - math.exp(-step / 60)
            odds_N = done * (0.7 * goodness * (0.3 + lam) + own_N) + pair_N + 0.2 * rng.normal(size=num_pairs)
            scores = pair_scores(odds_N, 3 - done * (0.6 * goodness + 0.3 - 0.4 * lam**2) + 0.05 * pair_N)
            metrics = {name: scores.value(name) for name in METRIC_MODES}
            shift = -3 + done * (0.8 - lam**2)
            metrics |= {"eval/chosen_logp": shift + metrics["eval/log_odds"] / 2}
            metrics |= {"eval/rejected_logp": shift - metrics["eval/log_odds"] / 2}
            speed = 2e5 * 1e6 / SIZES[size] * devices
            perf = {"perf/tokens_per_second": speed, "perf/peak_memory_gib": 0.5 + SIZES[size] / 1e7}
            add("log", step=step, metrics={"train/loss": 3.0} | perf)
            checkpoint = f"{run_dir}/trials/{trial_id}/step-{step}"
            add("eval", step=step, metrics=metrics, checkpoint=checkpoint, seconds=step * SIZES[size] / 1e7)
        if status == "finished":
            write_pairs(run_dir, trial_id, scores)
        errors = {
            "diverged": f"log-probabilities not finite at step {last + 3} for 2 pair(s): a, b",
            "failed": "Traceback (most recent call last):\n  File x\nRuntimeError: worker group ended: out of memory",
            "stopped_early": "paused at step 60 and not promoted",
        }
        add(
            "finished",
            status=status,
            steps=last,
            metrics=metrics,
            checkpoint=f"{run_dir}/trials/{trial_id}/step-{last}" if metrics else None,
            train_seconds=last * SIZES[size] / 1e7,
            error=errors.get(status),
        )
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    sweep = {"sweep_id": "made-up", "created": 1_700_000_000_000, "config": config_tree(run_dir.name)}
    write_results(run_dir / "sweep.json", sweep)
    results = summarize(run_dir.name, METRIC, "max", as_state(events))
    results["winners"] = summarize_winners(results, run_dir)
    write_results(run_dir / "results.json", results)
    return results


def write_generations(run_dir: Path, trial_id: str, said: str) -> None:
    """What a trial wrote at its last two evaluations, for three prompts."""
    rows = [
        {
            "step": step,
            "pair_id": f"p:{pair}",
            "prompt": f"Human: how do I make tea number {pair}?\n\nAssistant:",
            "chosen": "Heat water, add the leaves, wait.",
            "rejected": "No idea.",
            "generated": f"{said} (step {step}, pair {pair})",
        }
        for step in (100, 200)
        for pair in range(3)
    ]
    path = run_dir / "trials" / trial_id / "generations.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def small(
    rows: list[tuple[float, float, float | None, str]], metric: str = METRIC, mode: str = "max"
) -> dict[str, Any]:
    """Results of (λ, lr, value, status) without a journal."""
    trials = []
    for number, (lam, lr, value, status) in enumerate(rows):
        params = {"loss.orpo_lambda": lam, "optim.lr": lr}
        trials.append(trial(f"t{number:02d}", params, None, status))
        trials[-1]["metrics"] = {} if value is None else {metric: value}
    return {"name": "toy", "metric": metric, "mode": mode, "best": None, "trials": trials}


def data_of(results: dict[str, Any], state: SweepState) -> ReportData:
    """The same as a report reads it; there are no files."""
    return ReportData(Path("nowhere"), results, state, load_runs_frame(results), load_evaluations_frame(state))
