"""The command line, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert "no such file" in orpo_ray("plan", "nowhere.yaml", code=2)
    assert "no sweep 'nowhere'" in orpo_ray("report", "nowhere", code=2)


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
