"""A sweep that is killed again and again ends as if nothing had happened."""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter
from typing import Any

import pytest

from tests.support.real_sweeps import Sweeps

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(1500)]

SETTINGS = {"train.max_steps": 16, "train.eval_every": 4, "train.log_every": 4}
ASHA = {"type": "asha", "grace_steps": 4, "reduction_factor": 2}
LR = {"type": "loguniform", "low": 1.0e-4, "high": 1.0e-2}


def kill_at_random_moments(sweeps: Sweeps, name: str, arguments: list[str], kills: int, seed: int) -> int:
    """Start the sweep and SIGKILL its whole process tree, so many times, unless it ends before.

    A moment is drawn from the time that the journal grows: half of a start are imports, where nothing can be lost.
    Returns how often it was killed.
    """
    rng = random.Random(seed)
    for number in range(kills):
        process = sweeps.start(*arguments)
        lines = len(sweeps.events(name)) + rng.choice([0, 1, 2, 3, 5])
        while process.poll() is None and len(sweeps.events(name)) < lines:
            time.sleep(0.02)
        try:
            process.wait(rng.uniform(0.0, 1.0) if lines else rng.uniform(0.0, 20.0))
        except subprocess.TimeoutExpired:
            sweeps.kill(process)
        else:
            return number
    return kills


def check_nothing_lost_and_nothing_twice(sweeps: Sweeps, name: str) -> dict[str, dict[str, Any]]:
    events, results = sweeps.events(name), sweeps.results(name)
    trials = {t["trial_id"]: t for t in results["trials"]}
    assert len(trials) == len(results["trials"])
    counts = Counter((e["event"], e["trial_id"]) for e in events if e["event"] in ("submitted", "finished"))
    assert set(counts.values()) == {1}, f"submitted or finished twice: {counts}"
    assert len(counts) == 2 * len(trials)
    for kind in ("log", "eval"):
        points = Counter((e["trial_id"], e["step"]) for e in events if e["event"] == kind)
        assert set(points.values()) <= {1}, f"{kind} twice: {points}"
    _, runs = sweeps.mlflow_runs(name)
    assert runs.keys() == trials.keys()
    for trial in trials.values():
        assert trial["status"] in ("finished", "stopped_early"), trial
        steps = sweeps.metric_steps(trial["mlflow_run_id"], "train/loss")
        assert steps == list(range(4, trial["steps"] + 1, 4)), "a point is missing or there twice"
        wanted = "FINISHED" if trial["status"] == "finished" else "KILLED"
        assert runs[trial["trial_id"]].info.status == wanted
    return trials


def test_five_kills_change_nothing(sweeps: Sweeps) -> None:
    sweep = {
        "metric": "eval/nll",
        "num_samples": 6,
        "max_concurrent": 1,
        "scheduler": ASHA,
        "space": {"optim.lr": LR},
        "confirm": {"top": 1, "seeds": 2},
    }
    undisturbed = sweeps.write("undisturbed", sweep, **SETTINGS)
    sweeps.run("sweep", str(undisturbed))
    expected = check_nothing_lost_and_nothing_twice(sweeps, "undisturbed")

    file = sweeps.write("killed", sweep, **SETTINGS)
    kills = kill_at_random_moments(sweeps, "killed", ["sweep", str(file)], kills=5, seed=1)
    assert kills >= 4, "the sweep was too short to be killed"
    sweeps.run("sweep", str(file))
    trials = check_nothing_lost_and_nothing_twice(sweeps, "killed")
    assert trials.keys() == expected.keys()
    for trial_id, trial in trials.items():
        other = expected[trial_id]
        assert {k: trial[k] for k in ("params", "status", "steps", "purpose")} == {
            k: other[k] for k in ("params", "status", "steps", "purpose")
        }
        assert trial["metrics"]["eval/nll"] == pytest.approx(other["metrics"]["eval/nll"], rel=1e-5)


def test_a_model_based_search_survives_kills(sweeps: Sweeps) -> None:
    sweep = {
        "metric": "eval/nll",
        "num_samples": 6,
        "searcher": {"type": "optuna", "startup_trials": 3},
        "space": {"optim.lr": LR},
    }
    file = sweeps.write("optuna", sweep, **SETTINGS)
    kill_at_random_moments(sweeps, "optuna", ["sweep", str(file)], kills=2, seed=2)
    sweeps.run("sweep", str(file))
    trials = check_nothing_lost_and_nothing_twice(sweeps, "optuna")
    assert sorted(trials) == [f"{i:05d}" for i in range(6)]
    assert len({t["params"]["optim.lr"] for t in trials.values()}) == 6


def test_a_population_survives_a_kill(sweeps: Sweeps) -> None:
    sweep = {
        "metric": "eval/nll",
        "num_samples": 4,
        "scheduler": {"type": "pbt", "interval_steps": 4},
        "space": {"optim.lr": LR},
    }
    file = sweeps.write("population", sweep, **SETTINGS)
    process = sweeps.start("sweep", str(file))
    sweeps.wait_for("population", "forked")
    sweeps.kill(process)
    sweeps.run("sweep", str(file))
    trials = check_nothing_lost_and_nothing_twice(sweeps, "population")
    assert {t["steps"] for t in trials.values()} == {16}
    forks = [(e["step"], e["trial_id"]) for e in sweeps.events("population") if e["event"] == "forked"]
    assert [step for step, _ in forks] in ([4, 8, 12], [4, 12], [4, 8]), "an interval that a kill met may be left out"
