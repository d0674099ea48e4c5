"""The command line: most of it in a process of its own, as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.cli import main
from orpo_ray.config import parse
from orpo_ray.orchestration import ray_session
from orpo_ray.orchestration import sweep as sweeps
from orpo_ray.search import searchers
from orpo_ray.search.searcher import Size
from orpo_ray.storage.run_dir import EVENTS_FILE, RESULTS_FILE, SWEEP_FILE
from tests.support.events import as_state

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def orpo_ray(*arguments: str, code: int = 0, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "orpo_ray.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "200"} | environment,
    )
    assert run.returncode == code, run.stdout + run.stderr
    return run.stdout + run.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "--help"], ["plan", "--help"]])
def test_help_answers_at_once(arguments: list[str]) -> None:
    before = os.times()
    assert "orpo-ray" in orpo_ray(*arguments)
    after = os.times()
    # Not the clock: another test may run beside this one.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


def test_mistakes_are_told_without_a_traceback() -> None:
    output = orpo_ray("sweep", str(EXPERIMENTS / "quickstart.yaml"), "train.global_batch_size=0", code=2)
    assert "train.global_batch_size: Input should be greater than or equal to 1 (got 0)" in output
    assert "Traceback" not in output


SIZES = "size: {type: bundle, values: {s: {model.path: tiny-llama-2m}, l: {model.path: tiny-llama-8m}}}"
EXPERIMENT = f"""\
name: mistaken
model: {{path: tiny-llama-2m}}
data: {{path: builtin://style-pairs}}
train: {{max_steps: 4, eval_every: 2}}
sweep:
  num_samples: 4
  budget: {{device_hours: 1.0}}
  space: {{optim.lr: {{type: loguniform, low: 1.0e-4, high: 1.0e-2}}, {SIZES}}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with an experiment and damaged run directories; sweeps only propose, without Ray."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.yaml").write_text(EXPERIMENT)
    config, _ = parse({"name": "x", "model": {"path": "m"}, "data": {"path": "d"}, "train": {"epochs": 1}}).as_sweep()
    whole = json.dumps({"sweep_id": "x", "config": config.model_dump(mode="json")})
    for name, files in {
        "journal": {SWEEP_FILE: whole, EVENTS_FILE: "no\n{}\n"},
        "settings": {SWEEP_FILE: whole[:40], EVENTS_FILE: ""},
        "results": {RESULTS_FILE: "{"},
    }.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / "runs" / name / file).write_text(text)

    def proposed(config: Any, display: Any) -> None:
        at = {"trial_id": "0", "steps": 4, "train_seconds": 1e6}
        history = as_state(
            [
                {"event": "submitted", "trial_id": "0", "params": {"optim.lr": 0.001, "size": "l"}, "bundle": "l"},
                {"event": "eval", "trial_id": "0", "step": 4, "metrics": {"eval/preference_accuracy": 0.5}},
                {"event": "finished", "status": "finished", **at},
            ]
        )
        sizes = {"s": Size(2_000_000, 1), "l": Size(8_000_000, 1)}
        searchers.build(config.sweep, tmp_path, sizes, config.train.max_steps).propose(1, history)

    monkeypatch.setattr(sweeps, "run", proposed)
    monkeypatch.setattr(ray_session, "connected", lambda num_cpus: nullcontext())
    return tmp_path


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan nowhere.yaml", ["nowhere.yaml: no such file"]),
        ("train file.yaml data.path=nowhere.jsonl optim.lr", ["'optim.lr'", "write key.path=value"]),
        ("sweep file.yaml sweep=null", ["file.yaml has no sweep section"]),
        ("sweep file.yaml sweep.searcher.type=bohb", ["sweep.searcher", "'bohb'", "'optuna', 'hyperopt'"]),
        ("sweep file.yaml sweep.searcher.type=hyperopt", ["pip install 'orpo-ray[hyperopt]'"]),
        ("sweep file.yaml sweep.searcher.type=ladder", ["device-hours, and sweep.budget.device_hours is 1: raise it"]),
        ("reproduce paper", ["wordllama", "pip install 'orpo-ray[judges]'"]),
        ("report nowhere", ["no sweep 'nowhere'", "the nearest names there: "]),
        ("report journal", ["events.jsonl, line 1", "this file was damaged"]),
        ("report settings", ["sweep.json: damaged"]),
        ("report results", ["results.json: damaged"]),
        ("watch journal --once", ["events.jsonl: damaged between bytes 0 and 6"]),
        ("watch nowhere --once", ["no sweep 'nowhere'"]),
        ("compare nowhere journal", ["no sweep, trial or run 'nowhere'"]),
        ("compare journal journal", ["events.jsonl, line 1"]),
        ("transfer results", ["results.json: damaged"]),
        ("export settings", ["sweep.json: damaged"]),
        ("submit nowhere.yaml", ["nowhere.yaml: no such file"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    command: str, words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in ("hyperopt", "wordllama"):
        monkeypatch.setitem(sys.modules, extra, None)  # as if it were not installed
    assert main(command.split()) == 2
    message = capsys.readouterr().err
    assert [word for word in words if word not in message] == [], message
    assert "Traceback" not in message


def test_help_plan_and_submit_need_neither_torch_nor_ray() -> None:
    script = """\
    import contextlib, sys
    from orpo_ray.cli import parser
    heavy = {"torch", "deepspeed", "ray", "transformers", "mlflow", "pandas"}
    with contextlib.suppress(SystemExit):
        parser().parse_args(["--help"])
    assert not heavy & set(sys.modules), ("--help", heavy & set(sys.modules))
    import orpo_ray.planning.plan
    assert not heavy & set(sys.modules), ("plan", heavy & set(sys.modules))
    import orpo_ray.cluster.submit
    assert not {"torch", "deepspeed"} & set(sys.modules), ("submit", heavy & set(sys.modules))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "reproduce" in run.stdout


def test_plan_lists_trials_sizes_and_what_does_not_fit() -> None:
    quickstart = str(EXPERIMENTS / "quickstart.yaml")
    planned = json.loads(orpo_ray("plan", quickstart, "--json", "--num-cpus", "2", "--num-gpus", "0"))
    assert (planned["trials"], planned["concurrent"], planned["possible"]) == (16, 2, True)
    assert [size["label"] for size in planned["sizes"]] == ["1m", "4m"]
    assert [size["parameters"] for size in planned["sizes"]] == [922_752, 4_217_600]
    assert [size["trials"] for size in planned["sizes"]] == [8, 8]
    assert len(planned["cells"]) == 8
    assert [cell["model"] for cell in planned["cells"][:4]] == ["1m", "4m", "1m", "4m"]
    text = orpo_ray("plan", quickstart, "scaling.cpus_per_worker=4", "--num-cpus", "2", "--num-gpus", "0", code=1)
    assert "it would wait for ever" in text


def test_doctor_says_what_it_found_and_what_is_missing(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    found = orpo_ray("doctor", "--tracking-uri", uri, TORCH_EXTENSIONS_DIR=str(tmp_path))
    for word in ("packages: ray 2.60.0", "C++ compiler", "ninja", "RAY_AUTH_MODE", uri):
        assert word in found
    assert "problem" not in found
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "lock").touch()
    down = "http://127.0.0.1:9"
    problems = orpo_ray("doctor", "--tracking-uri", down, code=1, TORCH_EXTENSIONS_DIR=str(tmp_path), PATH="/nowhere")
    assert "problem MLflow" in problems
    assert "was left by a build that was killed" in problems
    assert "none found; DeepSpeed compiles ops at first use: install g++" in problems
