import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import orpo_ray
from orpo_ray.config import METRIC_MODES
from orpo_ray.config.flatten import settings_of
from orpo_ray.results.runs import read_sweep
from orpo_ray.storage.find import find_run_dir
from tests.support.run_dirs import BEGAN_MS, experiment, life, write_run
from tests.support.sweeps import pair_scores

LR = {"type": "loguniform", "low": 1e-4, "high": 1e-2}
LAMBDA = {"type": "grid", "values": [0.0, 0.1]}
SIZE = {
    "type": "bundle",
    "values": {
        "2m": {"model.path": "tiny-llama-2m"},
        "8m": {"model.path": "tiny-llama-8m", "scaling.num_workers": 2},
    },
}


@pytest.fixture
def toy(tmp_path):
    """A sweep with every kind of end."""
    config = experiment(tmp_path / "runs", "toy", {"size": SIZE, "optim.lr": LR, "loss.orpo_lambda": LAMBDA})
    scores = pair_scores(np.array([1.0, -1.0, 2.0]))

    def params(lr, lam=0.1, size="8m"):
        return {"size": size, "optim.lr": lr, "loss.orpo_lambda": lam}

    ended = [("finished", 20), ("stopped_early", 10), ("diverged", 10), ("failed", 10)]
    events = [
        event
        for number, (status, steps) in enumerate(ended)
        for event in life(config, f"{number:05d}", params(1e-3), scores, status, steps=steps, at=number)
    ]
    events += life(config, "c00000", params(1e-3, 0.0, "2m") | {"train.seed": 43}, scores, purpose="confirm", at=9)
    retry = {"event": "retry", "trial_id": "00000", "attempt": 1, "failures": 1, "error": "died"}
    retry["time"] = BEGAN_MS + 20
    again = next(e for e in events if e["event"] == "started") | {"attempt": 1, "time": BEGAN_MS + 30}
    events[2:2] = [retry, again]
    return config, events


def test_a_sweep_is_found_by_path_and_by_name(tmp_path, monkeypatch) -> None:
    for name, file in (("quick", "sweep.json"), ("wide", "results.json"), ("old", "events.jsonl")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / file).touch()
    (tmp_path / "runs" / "mlartifacts").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_run_dir(tmp_path / "runs" / "quick") == tmp_path / "runs" / "quick"
    assert find_run_dir("wide").resolve() == tmp_path / "runs" / "wide"
    assert find_run_dir("old", tmp_path / "runs") == tmp_path / "runs" / "old"
    with pytest.raises(FileNotFoundError, match="the nearest names there: quick") as caught:
        find_run_dir("quik")
    assert "mlartifacts" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="there is no sweep there"):
        find_run_dir("quick", tmp_path / "nowhere")


def test_a_table_of_every_trial(toy, tmp_path) -> None:
    config, events = toy
    write_run(config, events, run_ids={"00000": "a" * 32})
    frame = orpo_ray.load_runs("toy", output_dir=tmp_path / "runs")
    assert [*frame] == [
        *("trial_id", "name", "sweep", "bundle", "status", "purpose", "steps", "attempts", "train_seconds"),
        *("loss.orpo_lambda", "optim.lr", "model.path", "train.seed"),
        *METRIC_MODES,
        *("eval/chosen_logp", "mlflow_run_id", "checkpoint", "reused_from", "started", "ended"),
    ]
    assert frame["trial_id"].tolist() == ["00000", "00001", "00002", "00003", "c00000"]
    assert frame["status"].tolist() == ["finished", "stopped_early", "diverged", "failed", "finished"]
    assert frame["purpose"].tolist() == 4 * ["search"] + ["confirm"]
    assert frame["name"].tolist() == 4 * ["8m λ=0.1 lr=1.0e-03"] + ["2m λ=0 lr=1.0e-03 seed=43"]
    assert frame["attempts"].tolist() == [2, 1, 1, 1, 1]
    assert frame["steps"].tolist() == [20, 10, 10, 10, 20]
    assert frame["model.path"].tolist() == 4 * ["tiny-llama-8m"] + ["tiny-llama-2m"]
    assert frame["train.seed"].tolist() == [42, 42, 42, 42, 43]  # of the search: the config's
    assert frame["eval/log_odds"].tolist() == pytest.approx(5 * [2 / 3])
    assert frame["eval/preference_accuracy"].tolist() == pytest.approx(5 * [2 / 3])
    assert frame["mlflow_run_id"][0] == "a" * 32
    assert frame["mlflow_run_id"][1:].isna().all()
    assert frame["started"][1] == pd.Timestamp(BEGAN_MS + 1, unit="ms", tz="UTC")
    assert frame["ended"][0] == pd.Timestamp(BEGAN_MS + 1000, unit="ms", tz="UTC")
    kinds = frame.dtypes.astype(str).to_dict()
    assert (kinds["status"], kinds["model.path"], kinds["reused_from"]) == 3 * ("string",)
    assert (kinds["steps"], kinds["optim.lr"], kinds["train.seed"]) == ("int64", "float64", "int64")
    assert (kinds["started"], kinds["ended"]) == 2 * ("datetime64[ms, UTC]",)


def test_a_single_trial_by_name_and_by_its_directory(toy, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, events = toy
    run_dir = write_run(config, events)
    for name in ("toy/00001", f"{run_dir}/00001", f"{run_dir}/trials/00001"):
        frame = orpo_ray.load_runs(name, output_dir=tmp_path / "runs")
        assert frame["trial_id"].tolist() == ["00001"]
    with pytest.raises(FileNotFoundError, match=r"toy has no trial '7'; 5 trials, 00000 to c00000"):
        orpo_ray.load_runs("toy/7", output_dir=tmp_path / "runs")
    # Neither here nor in MLflow; and looking must not make a database.
    with pytest.raises(FileNotFoundError, match=r"nearest names there: toy\).*there is no .*mlflow.db"):
        orpo_ray.load_runs("toi", output_dir=tmp_path / "runs")
    assert not (tmp_path / "runs" / "mlflow.db").exists()


def test_a_sweep_under_way(tmp_path) -> None:
    config = experiment(tmp_path, "now", {"optim.lr": LR})
    scores = pair_scores(np.array([1.0, 3.0]))
    events = life(config, "00000", {"optim.lr": 1e-3}, scores, "unfinished")
    events += life(config, "00001", {"optim.lr": 2e-3}, None, "waiting", at=5)
    write_run(config, events, ended=False)
    frame = orpo_ray.load_runs("now", output_dir=tmp_path)
    assert frame["status"].tolist() == ["unfinished", "unfinished"]
    assert frame["attempts"].tolist() == [1, 0]
    assert frame["steps"].tolist() == [20, 0]
    assert frame["eval/log_odds"][0] == 2.0
    assert math.isnan(frame["eval/log_odds"][1])
    assert frame[["ended", "train_seconds", "mlflow_run_id"]].isna().all(axis=None)
    # An interrupted sweep has results, in which such trials count as failed.
    write_run(config, events)
    assert orpo_ray.load_runs("now", output_dir=tmp_path)["status"].tolist() == ["unfinished", "unfinished"]


def test_the_settings_of_a_trial_are_those_it_ran_with(tmp_path) -> None:
    """Also where one setting implies others: those of the file's objective are not those of another."""
    space = {"loss.name": {"type": "grid", "values": ["orpo", "simpo"]}, "optim.lr": LR}
    config = experiment(tmp_path, "losses", space, **{"loss.preset": None, "loss.nll_scope": "response"})
    params = {"loss.name": "simpo", "optim.lr": 1e-3}
    write_run(config, life(config, "00000", params, pair_scores(np.ones(3))))
    (trial,) = read_sweep("losses", output_dir=tmp_path).trials
    expected = settings_of(config.trial(params))
    assert trial.settings == expected | {"model.parameters": 2_000_000, "forward.rows": "shared prompt"}
    assert (trial.settings["loss.simpo_gamma"], trial.settings["loss.orpo_lambda"]) == (
        expected["loss.simpo_gamma"],
        None,
    )
    assert trial.settings["loss.simpo_gamma"] is not None


def test_what_scaling_auto_became(tmp_path) -> None:
    config = experiment(tmp_path, "auto", {"size": SIZE})
    run_dir = write_run(config, life(config, "00000", {"size": "2m"}, pair_scores(np.ones(3))))
    (run_dir / "fitted.json").write_text(json.dumps({"2m": {"scaling.num_workers": 3}, "8m": {}}))
    record = read_sweep(run_dir)
    assert record.trials[0].settings["scaling.num_workers"] == 3
    assert record.trials[0].device_seconds == 3 * 3.5
    assert "scaling.num_workers" not in record.settings
    assert record.search["sweep.space.size"]["values"]["2m"]["scaling.num_workers"] == 3
    single = experiment(tmp_path, "one", {})
    run_dir = write_run(single, life(single, "00000", {}, pair_scores(np.ones(3))))
    (run_dir / "fitted.json").write_text(json.dumps({"": {"deepspeed.zero_stage": 2}}))
    assert read_sweep(run_dir).trials[0].settings["deepspeed.zero_stage"] == 2


def test_the_package_is_imported_at_once() -> None:
    heavy = {"pandas", "mlflow", "torch", "ray", "scipy"}
    code = f"import sys, orpo_ray; from orpo_ray.results.runs import find_run_dir; print({heavy!r} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "set()"
    assert orpo_ray.load_runs.__module__ == "orpo_ray.results.runs"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = orpo_ray.nothing
