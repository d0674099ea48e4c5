"""Whole sweeps on real Ray, DeepSpeed and MLflow, through the command line."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any

import pytest

from tests.support.real_sweeps import Sweeps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FAST = {"train.max_steps": 12, "train.eval_every": 4, "train.log_every": 2}


def test_every_way_to_end(sweeps: Sweeps) -> None:
    """Six trials: of the good model one finishes, one is stopped early, one diverges; the other model is not there."""
    file = sweeps.write(
        "ends",
        {
            "metric": "eval/nll",
            "max_concurrent": 1,
            "scheduler": {"type": "asha", "grace_steps": 4, "reduction_factor": 2},
            "space": {
                "optim.lr": {"type": "grid", "values": [3.0e-3, 1.0e-6, 1.0e30]},
                "model": {
                    "type": "bundle",
                    "values": {"good": {"model.path": "tiny-llama-1m"}, "missing": {"model.path": "no/such-folder"}},
                },
            },
        },
        **FAST,
    )
    output = sweeps.run("sweep", str(file))

    results = sweeps.results("ends")
    by_params = {(t["params"]["model"], t["params"]["optim.lr"]): t for t in results["trials"]}
    assert len(by_params) == 6
    finished, stopped, diverged = (by_params["good", lr] for lr in (3.0e-3, 1.0e-6, 1.0e30))
    assert (finished["status"], finished["steps"]) == ("finished", 12)
    assert (stopped["status"], stopped["steps"]) == ("stopped_early", 4)
    assert (diverged["status"], diverged["steps"]) == ("diverged", 2)
    assert "step 2" in diverged["error"]
    assert "style-pairs:" in diverged["error"]
    for lr in (3.0e-3, 1.0e-6, 1.0e30):
        missing = by_params["missing", lr]
        assert (missing["status"], missing["steps"]) == ("failed", 0)
        assert missing["error"].startswith("ModelError: model.path no/such-folder")
    assert results["best"]["trial_id"] == finished["trial_id"]
    assert finished["metrics"]["eval/nll"] < stopped["metrics"]["eval/nll"]

    parent, children = sweeps.mlflow_runs("ends")
    assert parent.info.status == "FINISHED"
    assert {t["trial_id"]: t["mlflow_run_id"] for t in results["trials"]} == {
        trial_id: run.info.run_id for trial_id, run in children.items()
    }
    status = {key: children[trial["trial_id"]].info.status for key, trial in by_params.items()}
    assert status["good", 3.0e-3] == "FINISHED"
    assert status["good", 1.0e-6] == "KILLED"
    assert status["good", 1.0e30] == "FAILED"
    assert status["missing", 3.0e-3] == "FAILED"
    run = children[finished["trial_id"]]
    assert run.data.params["optim.lr"] == "0.003"
    assert run.data.params["model"] == "good"
    assert run.data.params["forward.rows"] == "shared prompt"
    assert run.data.params["worker.threads"] == "1"  # the CPUs it was given, not those of the machine
    assert run.data.metrics["final/nll"] == pytest.approx(finished["metrics"]["eval/nll"])
    assert sweeps.metric_steps(run.info.run_id, "train/loss") == [2, 4, 6, 8, 10, 12]
    assert sweeps.metric_steps(run.info.run_id, "eval/nll") == [4, 8, 12]
    assert children[diverged["trial_id"]].data.tags["orpo_ray.diverged"] == "true"

    assert "optim.lr" in output or "lr=" in output
    assert "mlflow ui --backend-store-uri sqlite:///" in output
    assert (sweeps.folder / "runs" / "ends" / "report.md").exists()

    # The same command again repeats nothing.
    before = sweeps.events("ends")
    sweeps.run("sweep", str(file))
    assert sweeps.events("ends") == before
    # Another sweep under the same name is refused, and says what differs.
    process = sweeps.start("sweep", str(file), "train.max_steps=16")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "train.max_steps was 12, is 16" in output.replace("\n", " ")


TWO_RUNS: dict[str, Any] = {"space": {"optim.lr": {"type": "grid", "values": [1.0e-3, 2.0e-3]}}}


def test_killed_worker_restarts_its_group_and_its_trial_goes_on(sweeps: Sweeps) -> None:
    settings = {"train.max_steps": 60, "train.eval_every": 20, "train.log_every": 5}
    undisturbed = sweeps.write("undisturbed", TWO_RUNS, **settings)
    sweeps.run("sweep", str(undisturbed))
    file = sweeps.write("killed", {**TWO_RUNS, "max_concurrent": 1}, **settings, **{"scaling.num_workers": 2})
    file.write_text(file.read_text().replace("global_batch_size: 8", "global_batch_size: 8"))
    process = sweeps.start("sweep", str(file))
    started = sweeps.wait_for("killed", "started")
    sweeps.wait_for("killed", "log", step=25)
    victim = int(started["processes"][1].rsplit(":", 1)[1])
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

    results, expected = sweeps.results("killed"), sweeps.results("undisturbed")
    assert [t["status"] for t in results["trials"]] == ["finished", "finished"]
    retries = [e for e in sweeps.events("killed") if e["event"] == "retry"]
    assert [(e["trial_id"], e["attempt"]) for e in retries] == [(started["trial_id"], 1)]
    again = [e for e in sweeps.events("killed") if e["event"] == "started" and e["trial_id"] == started["trial_id"]]
    assert [e["step"] for e in again] == [0, 20]
    expected_nll = {t["params"]["optim.lr"]: t["metrics"]["eval/nll"] for t in expected["trials"]}
    for trial in results["trials"]:
        assert trial["metrics"]["eval/nll"] == pytest.approx(expected_nll[trial["params"]["optim.lr"]], rel=1e-5)
        steps = sweeps.metric_steps(trial["mlflow_run_id"], "train/loss")
        assert steps == list(range(5, 61, 5)), "a point is missing or there twice"


def test_killed_sweep_goes_on_where_it_was(sweeps: Sweeps) -> None:
    settings = {"train.max_steps": 60, "train.eval_every": 20, "train.log_every": 5}
    file = sweeps.write("machine", {**TWO_RUNS, "max_concurrent": 1}, **settings)
    process = sweeps.start("sweep", str(file))
    second = sweeps.wait_for("machine", "eval", step=20, trial_id=_second_trial(sweeps, "machine"))
    manifest = sweeps.folder / "runs" / "machine" / "trials" / second["trial_id"] / "step-00000020" / "manifest.json"
    deadline = time.monotonic() + 60
    while not manifest.exists():  # checkpoints are committed in the background
        assert time.monotonic() < deadline, "no checkpoint of step 20"
        time.sleep(0.05)
    sweeps.kill(process)
    before = sweeps.events("machine")

    sweeps.run("sweep", str(file))
    events = sweeps.events("machine")
    assert events[: len(before) - 1] == before[: len(before) - 1]
    results = sweeps.results("machine")
    assert [t["status"] for t in results["trials"]] == ["finished", "finished"]
    # Which of the two is proposed first is a race; the second to start is the one that was interrupted.
    (first_trial,) = {t["trial_id"] for t in results["trials"]} - {second["trial_id"]}
    assert sum(e["event"] == "started" and e["trial_id"] == first_trial for e in events) == 1, (
        "a finished trial ran again"
    )
    resumed = [e["step"] for e in events if e["event"] == "started" and e["trial_id"] == second["trial_id"]]
    assert resumed == [0, 20]
    parent, children = sweeps.mlflow_runs("machine")
    assert parent.info.status == "FINISHED"
    assert len(children) == 2
    for trial in results["trials"]:
        assert children[trial["trial_id"]].info.status == "FINISHED"
        assert sweeps.metric_steps(trial["mlflow_run_id"], "train/loss") == list(range(5, 61, 5))
        assert sweeps.metric_steps(trial["mlflow_run_id"], "eval/nll") == [20, 40, 60]


def _second_trial(sweeps: Sweeps, name: str) -> str:
    first = sweeps.wait_for(name, "finished")["trial_id"]
    deadline_event = sweeps.wait_for(name, "log", step=5)
    assert deadline_event
    while True:
        others = [e["trial_id"] for e in sweeps.events(name) if e["event"] == "started" and e["trial_id"] != first]
        if others:
            return str(others[0])


def test_optuna_searches_and_bundles_with_other_resources_share_the_cluster(sweeps: Sweeps) -> None:
    file = sweeps.write(
        "optuna",
        {
            "num_samples": 5,
            "searcher": {"type": "optuna", "startup_trials": 3},
            "scheduler": {"type": "median", "grace_steps": 4, "min_trials": 2},
            "space": {
                "optim.lr": {"type": "loguniform", "low": "1e-4", "high": "1e-2"},
                "loss.orpo_lambda": {"type": "uniform", "low": 0.0, "high": 1.0},
                "model": {
                    "type": "bundle",
                    "values": {
                        "one": {"train.micro_batch_size": 8},
                        "two": {"scaling.num_workers": 2, "deepspeed.zero_stage": 3, "train.micro_batch_size": 4},
                    },
                },
            },
        },
        **FAST,
    )
    sweeps.run("sweep", str(file))
    results = sweeps.results("optuna")
    assert len(results["trials"]) == 5
    assert {t["status"] for t in results["trials"]} <= {"finished", "stopped_early"}
    assert all(1e-4 <= t["params"]["optim.lr"] <= 1e-2 for t in results["trials"])
    assert len({t["params"]["optim.lr"] for t in results["trials"]}) == 5


def test_single_run_is_a_sweep_of_one_trial(sweeps: Sweeps) -> None:
    file = sweeps.write("single", TWO_RUNS, **FAST)
    output = sweeps.run("train", str(file), "optim.lr=5e-4", "name=once")
    (trial,) = sweeps.results("once")["trials"]
    assert (trial["status"], trial["params"]) == ("finished", {})
    assert re.search(r"single run", output)
    parent, children = sweeps.mlflow_runs("once")
    assert parent.data.params["optim.lr"] == "0.0005"
    assert children[trial["trial_id"]].data.params["optim.lr"] == "0.0005"
