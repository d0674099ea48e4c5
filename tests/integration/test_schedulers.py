"""Pauses, promotions and exploits among real processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import experiment, train
from tests.support.real_sweeps import Sweeps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = {"train.max_steps": 16, "train.eval_every": 4, "train.log_every": 4}
RATES = [1.0e-4, 3.0e-4, 1.0e-3, 3.0e-3]


def trained_alone(sweeps: Sweeps, folder: Path, lr: float, **changes: Any) -> Any:
    config = experiment(sweeps.folder / "cache", **SETTINGS, **{"optim.lr": lr}, **changes)
    return train(config, folder)


def of(events: list[dict[str, Any]], kind: str, trial_id: str) -> list[int]:
    return [e["step"] for e in events if e["event"] == kind and e["trial_id"] == trial_id]


def test_asha_pauses_at_rungs_and_promotes_the_best(sweeps: Sweeps) -> None:
    """One slot, four trials: all have their turn, half go on, half of those to the end, from where they were."""
    scheduler = {"type": "asha", "grace_steps": 4, "reduction_factor": 2}
    space = {"optim.lr": {"type": "grid", "values": RATES}}
    file = sweeps.write(
        "asha", {"metric": "eval/nll", "max_concurrent": 1, "scheduler": scheduler, "space": space}, **SETTINGS
    )
    sweeps.run("sweep", str(file))
    trials = {t["params"]["optim.lr"]: t for t in sweeps.results("asha")["trials"]}
    assert {lr: (t["status"], t["steps"]) for lr, t in trials.items()} == {
        1.0e-4: ("stopped_early", 4),
        3.0e-4: ("stopped_early", 4),
        1.0e-3: ("stopped_early", 8),
        3.0e-3: ("finished", 16),
    }
    events = sweeps.events("asha")
    second, best = trials[1.0e-3]["trial_id"], trials[3.0e-3]["trial_id"]
    # The best arrived last at the first rung, where it was among the best: it had no need to wait there.
    assert of(events, "paused", second) == [4, 8]
    assert of(events, "started", second) == [0, 4]
    assert of(events, "paused", best)[-1] == 8
    assert of(events, "started", best)[-1] == 8
    assert of(events, "eval", best) == [4, 8, 12, 16]
    alone = trained_alone(sweeps, sweeps.folder / "alone", 3.0e-3)
    assert trials[3.0e-3]["metrics"]["eval/nll"] == pytest.approx(alone.evals[16]["eval/nll"], rel=1e-5), (
        "pausing changed the training"
    )
    assert sweeps.metric_steps(trials[3.0e-3]["mlflow_run_id"], "train/loss") == [4, 8, 12, 16]


@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_the_worst_of_a_population_go_on_from_the_best(scheduler: str, sweeps: Sweeps) -> None:
    """One exchange: what the forked trial reaches is what the donor's weights and optimizer reach with its settings."""
    sweep = {
        "metric": "eval/nll",
        "num_samples": 4,
        "scheduler": {"type": scheduler, "interval_steps": 8},
        "space": {"optim.lr": {"type": "loguniform", "low": 1.0e-4, "high": 1.0e-2}},
    }
    file = sweeps.write("population", sweep, **SETTINGS)
    output = sweeps.run("sweep", str(file))
    events, trials = sweeps.events("population"), sweeps.results("population")["trials"]
    by_id = {t["trial_id"]: t for t in trials}
    assert [t["status"] for t in trials] == ["finished"] * 4, output
    (fork,) = [e for e in events if e["event"] == "forked"]
    at_8 = {e["trial_id"]: e["metrics"]["eval/nll"] for e in events if e["event"] == "eval" and e["step"] == 8}
    assert fork["step"] == 8
    assert fork["trial_id"] == max(at_8, key=lambda t: at_8[t]), "not the worst was replaced"
    assert fork["donor"] == min(at_8, key=lambda t: at_8[t]), "not the best was copied"
    forked, donor = by_id[fork["trial_id"]], by_id[fork["donor"]]
    assert forked["params"] == fork["params"] != donor["params"]
    assert 1.0e-4 <= forked["params"]["optim.lr"] <= 1.0e-2
    assert [(f["step"], f["donor"]) for f in forked["forks"]] == [(8, donor["trial_id"])]

    cut = {"train.checkpoint_every": 8}
    first = sweeps.folder / "donor"
    config = experiment(sweeps.folder / "cache", **SETTINGS, **cut, **{"optim.lr": donor["params"]["optim.lr"]})
    train(config, first, stop_at=8)
    second = sweeps.folder / "forked"
    shutil.copytree(first, second)
    again = trained_alone(sweeps, second, forked["params"]["optim.lr"], **cut)
    assert again.started_at == 8
    assert forked["metrics"]["eval/nll"] == pytest.approx(again.evals[16]["eval/nll"], rel=1e-5)
    whole = trained_alone(sweeps, sweeps.folder / "whole", forked["params"]["optim.lr"])
    assert forked["metrics"]["eval/nll"] != pytest.approx(whole.evals[16]["eval/nll"], rel=1e-4), "it was not forked"

    run = sweeps.mlflow_runs("population")[1][forked["trial_id"]]
    assert run.data.metrics["axes/optim.lr"] == forked["params"]["optim.lr"]
    assert run.data.tags["orpo_ray.last_fork"] == f"of trial {donor['trial_id']} at step 8"


def test_hyperband_halves_its_brackets(sweeps: Sweeps) -> None:
    sweep = {
        "metric": "eval/nll",
        "num_samples": 6,
        "scheduler": {"type": "hyperband", "reduction_factor": 2},
        "searcher": {"type": "random"},
        "space": {"optim.lr": {"type": "loguniform", "low": 1.0e-4, "high": 1.0e-2}},
    }
    sweeps.run("sweep", str(sweeps.write("hyperband", sweep, **SETTINGS)))
    trials, events = sweeps.results("hyperband")["trials"], sweeps.events("hyperband")
    assert len({t["params"]["optim.lr"] for t in trials}) == 6
    # The first bracket of 16 steps in 4 evaluations: 4 trials of 4 steps, 2 of 8, 1 of 16.
    bracket = sorted(trials[:4], key=lambda t: t["steps"])
    assert [t["steps"] for t in bracket] == [4, 4, 8, 16]
    at_4 = {e["trial_id"]: e["metrics"]["eval/nll"] for e in events if e["event"] == "eval" and e["step"] == 4}
    assert max(at_4[t["trial_id"]] for t in bracket[2:]) < min(at_4[t["trial_id"]] for t in bracket[:2])
    # Whoever comes last completes the bracket, and hears at once whether to go on; the others wait for it.
    waited = [t for t in at_4 if t in {t["trial_id"] for t in bracket}][:3]
    assert all(4 in of(events, "paused", trial_id) for trial_id in waited)
