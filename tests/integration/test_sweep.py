"""Whole sweeps on real Ray, DeepSpeed and MLflow, through the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.support.ranks import Job, experiment, train_all
from tests.support.real_sweeps import Sweeps, table_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FAST = {"train.max_steps": 12, "train.eval_every": 4, "train.log_every": 2}


@dataclass(frozen=True)
class Ended:
    """The sweep `ends`, which some tests only look at."""

    sweeps: Sweeps
    file: Path
    output: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    """Six trials: of the good model one finishes, one is stopped early, one diverges; the other model is missing."""
    sweeps = Sweeps(tmp_path_factory.mktemp("ends"))
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
    yield Ended(sweeps, file, sweeps.run("sweep", str(file), env={"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}))
    sweeps.close()


def good(results: dict[str, Any], lr: float) -> dict[str, Any]:
    """The trial of the model that exists with this learning rate."""
    (trial,) = [t for t in results["trials"] if t["params"] == {"model": "good", "optim.lr": lr}]
    return dict(trial)


@pytest.mark.core
def test_every_way_to_end(ended: Ended) -> None:
    sweeps, output = ended.sweeps, ended.output
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


def test_a_sweep_leaves_what_the_user_interface_draws(ended: Ended) -> None:
    """Of a trial: its data, what it answered, its model, its notes; of the sweep, how busy the node was."""
    sweeps = ended.sweeps
    parent, children = sweeps.mlflow_runs("ends")
    trial = good(sweeps.results("ends"), 3.0e-3)
    child = children[trial["trial_id"]]
    client = MlflowClient(f"sqlite:///{sweeps.folder / 'runs' / 'mlflow.db'}")
    steps = sweeps.metric_steps(parent.info.run_id, "system/node_0/cpu_utilization_percentage")
    assert steps == list(range(1, len(steps) + 1)) != []
    assert 0 < parent.data.metrics["system/node_0/system_memory_usage_percentage"] < 100

    assert [(i.dataset.name, i.tags[0].value) for i in child.inputs.dataset_inputs] == [
        ("builtin://style-pairs", "training"),
        ("builtin://style-pairs", "evaluation"),
    ]
    pairs = [json.loads(i.dataset.profile)["num_rows"] for i in child.inputs.dataset_inputs]
    assert pairs == [256, 24]
    assert {i.dataset.digest for i in parent.inputs.dataset_inputs} == {
        i.dataset.digest for i in child.inputs.dataset_inputs
    }
    assert child.data.tags["orpo_ray.checkpoint"] == trial["checkpoint"]
    models = client.search_logged_models([child.info.experiment_id])
    (model,) = [model for model in models if model.source_run_id == child.info.run_id]
    assert model.tags["orpo_ray.checkpoint"] == trial["checkpoint"]
    final = {m.key: m.value for m in model.metrics}
    assert final["final/preference_accuracy"] == pytest.approx(trial["metrics"]["eval/preference_accuracy"])
    assert {"optim.lr": "0.003", "axes.optim.lr": "0.003"}.items() <= child.data.params.items()
    assert float(child.data.params["model.parameters"]) > 0
    note = child.data.tags["mlflow.note.content"]
    assert trial["checkpoint"] in note
    assert f"orpo-ray train {ended.file} name=ends-{trial['trial_id']} " in note
    assert " optim.lr=0.003" in note
    assert "**Best: " in parent.data.tags["mlflow.note.content"]
    table = table_of(client, child.info.run_id, sweeps.folder)
    assert table["columns"] == ["step", "pair_id", "prompt", "chosen", "rejected", "generated"]
    assert {row[0] for row in table["data"]} == {4, 8, 12}


def test_the_same_command_again_repeats_nothing(ended: Ended) -> None:
    before = ended.sweeps.events("ends")
    ended.sweeps.run("sweep", str(ended.file))
    assert ended.sweeps.events("ends") == before


def test_another_sweep_under_the_same_name_is_refused_and_told_what_differs(ended: Ended) -> None:
    process = ended.sweeps.start("sweep", str(ended.file), "train.max_steps=16")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "train.max_steps was 12, is 16" in output.replace("\n", " ")


TWO_RUNS: dict[str, Any] = {"space": {"optim.lr": {"type": "grid", "values": [1.0e-3, 2.0e-3]}}}


def test_killed_worker_restarts_its_group_and_its_trial_goes_on(sweeps: Sweeps) -> None:
    settings = {"train.max_steps": 60, "train.eval_every": 20, "train.log_every": 5}
    rates = TWO_RUNS["space"]["optim.lr"]["values"]
    configs = [experiment(sweeps.folder / "cache", **settings, **{"optim.lr": lr}) for lr in rates]
    undisturbed = train_all([Job(config, sweeps.folder / str(i)) for i, config in enumerate(configs)])
    file = sweeps.write("killed", {**TWO_RUNS, "max_concurrent": 1}, **settings, **{"scaling.num_workers": 2})
    process = sweeps.start("sweep", str(file))
    started = sweeps.wait_for("killed", "started")
    sweeps.wait_for("killed", "log", step=25)
    victim = int(started["processes"][1].rsplit(":", 1)[1])
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

    results = sweeps.results("killed")
    assert [t["status"] for t in results["trials"]] == ["finished", "finished"]
    retries = [e for e in sweeps.events("killed") if e["event"] == "retry"]
    assert [(e["trial_id"], e["attempt"]) for e in retries] == [(started["trial_id"], 1)]
    again = [e for e in sweeps.events("killed") if e["event"] == "started" and e["trial_id"] == started["trial_id"]]
    assert [e["step"] for e in again] == [0, 20]
    expected_nll = {lr: record.evals[60]["eval/nll"] for lr, record in zip(rates, undisturbed, strict=True)}
    for trial in results["trials"]:
        assert trial["metrics"]["eval/nll"] == pytest.approx(expected_nll[trial["params"]["optim.lr"]], rel=1e-5)
        steps = sweeps.metric_steps(trial["mlflow_run_id"], "train/loss")
        assert steps == list(range(5, 61, 5)), "a point is missing or there twice"


@pytest.mark.core
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
