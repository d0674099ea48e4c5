"""Work besides training, on a Ray cluster of its own: at once, kept, and with its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SCRIPT = """
import json, os, sys, time
from pathlib import Path
import ray
from rich.console import Console
from orpo_ray.config import ScalingConfig
from orpo_ray.data.rows import DataError
from orpo_ray.orchestration.tasks import Task, TaskError, run_all

folder = Path(sys.argv[1])

def noted(name):
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runs" / f"{name}-{time.monotonic_ns()}").touch()

def meets(name, other):
    noted(name)
    deadline = time.monotonic() + 60
    while not list((folder / "runs").glob(f"{other}-*")):
        assert time.monotonic() < deadline, f"{other} does not run beside {name}"
        time.sleep(0.02)
    for part in (0.1 + 0.2, 2):
        yield 1, part

def fails(name):
    noted(name)
    yield 1, 1
    raise DataError("no such pairs")

def dies(name):
    noted(name)
    os._exit(3)
    yield

def dies_once(name):
    noted(name)
    yield 1, "a"
    if len(list((folder / "runs").glob(f"{name}-*"))) == 1:
        os._exit(3)
    yield 1, "b"

def devices(name):
    yield 1, [ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES")]

def task(name, parts, *arguments, asked="a"):
    return Task(name, f"work {name}", {"asked": (asked,)}, parts, (name, *arguments), 2, list)

def outcome(*tasks, use_gpu=False):
    try:
        return run_all(tasks, folder / "kept", ScalingConfig(use_gpu=use_gpu), Console())
    except (DataError, TaskError) as error:
        return [type(error).__name__, str(error)]

# A GPU that is not there, but Ray hands out what it is told of.
ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
try:
    first = outcome(task("x", meets, "y"), task("y", meets, "x"))
    again = outcome(task("x", meets, "y"), task("y", meets, "x", asked="b"))
    failed = outcome(task("z", fails), task("v", dies_once))
    once = outcome(task("v", dies_once))
    died = outcome(task("x", meets, "y"), task("w", dies))
    on_gpu = [outcome(task(f"d{use}", devices), use_gpu=use)[f"d{use}"] for use in (True, "auto", False)]
finally:
    ray.shutdown()
ran = sorted(path.name.partition("-")[0] for path in (folder / "runs").iterdir())
print(json.dumps([first, again, failed, once, died, on_gpu, ran]))
"""


def test_tasks_run_side_by_side_are_kept_and_raise_what_they_raise(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    first, again, failed, once, died, on_gpu, ran = found
    assert first == {"x": [0.1 + 0.2, 2], "y": [0.1 + 0.2, 2]}
    assert again == first
    assert failed == ["DataError", "no such pairs"]
    assert died[0] == "TaskError"
    assert died[1].startswith("work w: WorkerCrashedError: ")
    assert on_gpu == [[[[0], "0"]], [[[0], "0"]], [[[], ""]]]
    assert once == {"v": ["a", "b"]}  # no part twice; and kept, though another task had failed beside it
    # Once each: what is kept is not computed again, and what asks something else is.
    assert [ran.count(name) for name in "xyzvw"] == [1, 2, 1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir())[-3:] == ["v.json", "x.json", "y.json"]
    assert "work x: done" in done.stdout
