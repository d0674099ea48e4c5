"""What a plan says of a sweep before anything starts."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_ray.config import DataConfig, parse
from orpo_ray.formatting import GIB
from orpo_ray.hardware import NodeMemory, this_machine
from orpo_ray.models.precision import has_bf16_units
from orpo_ray.planning import speed
from orpo_ray.planning.architecture import architecture_of
from orpo_ray.planning.plan import Plan, plan
from orpo_ray.planning.plan_table import plan_table
from orpo_ray.storage.run_dir import EVENTS_FILE

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
LAPTOP = NodeMemory(cpus=4, gpus=0, memory_bytes=16 * GIB)
SIZES = {
    "1m": {"model.path": "tiny-llama-1m"},
    "8m": {"model.path": "tiny-llama-8m", "scaling.num_workers": 2, "deepspeed.zero_stage": 2},
}


def planned(node: NodeMemory = LAPTOP, sizes: Any = SIZES, rate: float | None = 1e11, **settings: Any) -> Plan:
    tree = {
        "name": "test",
        "output_dir": "nowhere",
        "model": {"path": "tiny-llama-1m"},
        "data": {"path": "builtin://style-pairs", "eval_pairs": 32, "max_tokens": 256, "max_prompt_tokens": 160},
        "train": {"global_batch_size": 16, "max_steps": 100, "eval_every": 20},
        "sweep": {
            "space": {
                "loss.orpo_lambda": {"type": "grid", "values": [0.0, 0.1, 1.0]},
                "optim.lr": {"type": "loguniform", "low": 1e-4, "high": 1e-3},
            }
        },
    }
    if sizes:
        tree["sweep"]["space"]["size"] = {"type": "bundle", "values": sizes}
    config = parse(tree, [f"{path.replace('__', '.')}={json.dumps(value)}" for path, value in settings.items()])
    return plan(config, node, rate)


def texts(found: Plan, kind: str) -> list[str]:
    return [problem.text for problem in found.problems if problem.kind == kind]


def test_sizes_and_totals() -> None:
    found = planned()
    small, large = found.sizes
    assert (found.trials, small.trials, large.trials) == (6, 3, 3)
    assert (found.concurrent, small.at_once, large.at_once) == (4, 4, 2)
    assert small.parameters == architecture_of(parse(EXAMPLE).model).parameters == 922_752
    assert small.checkpoint_bytes == 12 * 922_752
    assert large.checkpoint_bytes == 16 * large.parameters
    in_all = 3 * (small.checkpoint_bytes + large.checkpoint_bytes)
    assert found.checkpoint_bytes == in_all + 4 * large.checkpoint_bytes, "a new one is written before the old one goes"
    assert found.device_hours == pytest.approx(small.device_hours + large.device_hours)
    # Three trials on four places, and three on two places, one and a half rounds of them.
    assert found.wall_hours == pytest.approx((small.seconds_per_trial + 1.5 * large.seconds_per_trial) / 3600)
    assert found.possible
    assert not texts(found, "error")


EXAMPLE = {
    "name": "example",
    "model": {"path": "tiny-llama-1m"},
    "data": {"path": "builtin://style-pairs"},
    "train": {"max_steps": 10},
}


def test_time_follows_work_and_devices() -> None:
    slow, fast = planned(rate=1e10), planned(rate=2e10)
    assert slow.wall_hours == pytest.approx(2 * fast.wall_hours)
    one = planned(sizes=None, rate=1e10).sizes[0]
    two = planned(sizes=None, rate=1e10, scaling__num_workers=2).sizes[0]
    assert two.seconds_per_step == pytest.approx(one.seconds_per_step / 2)
    assert two.device_hours == pytest.approx(one.device_hours)
    assert planned(sizes=None, model__lora={"rank": 4}).sizes[0].seconds_per_step < one.seconds_per_step


def test_operations_are_six_per_weight_and_token() -> None:
    config = parse(EXAMPLE)
    shape = architecture_of(config.model)
    short = speed.PairTokens(1.0, 1.0, "")
    per_token = 6 * (shape.linear_parameters + shape.hidden * shape.vocabulary)
    assert speed.pair_flops(config, shape, short) == pytest.approx(2 * per_token, rel=0.01)


def test_lengths_of_the_builtin_pairs_are_about_right() -> None:
    from orpo_ray.data.dataset import load_pairs
    from orpo_ray.models.loading import load_tokenizer

    data = DataConfig(path="builtin://style-pairs", train_pairs=256, eval_pairs=8)
    found = speed.pair_tokens(data)
    real = load_pairs(data, load_tokenizer(parse(EXAMPLE).model))[0].lengths_N3.sum(1).mean()
    assert found.prompt + found.answers == pytest.approx(real, rel=0.25)
    assert "assumed" in speed.pair_tokens(DataConfig(path="someone/dataset")).basis


def test_lora_saves_adapters_only() -> None:
    size = planned(sizes=None, model__lora={"rank": 4}).sizes[0]
    assert size.checkpoint_bytes == 12 * size.trainable_parameters + 4 * 1024 * 128 < 12 * size.parameters / 5


def test_what_finds_no_room() -> None:
    found = planned(NodeMemory(1, 0, 16 * GIB))
    assert not found.possible
    assert any("8m needs 2 workers" in text and "wait for ever" in text for text in texts(found, "error"))


def test_what_does_not_fit_in_memory() -> None:
    found = planned(NodeMemory(4, 0, GIB // 2))
    assert any(text.startswith("1m does not fit in memory") for text in texts(found, "error"))
    crowded = planned(NodeMemory(64, 0, 8 * GIB), sizes=None, sweep__num_samples=30)
    (text,) = texts(crowded, "error")
    assert "64 trials would train at once, but memory holds 7" in text
    assert "sweep.max_concurrent=7" in text
    assert planned(NodeMemory(64, 0, 8 * GIB), sizes=None, sweep__num_samples=30, sweep__max_concurrent=7).possible


def test_auto_fits_where_what_is_given_does_not() -> None:
    found = planned(NodeMemory(64, 0, 8 * GIB), sizes=None, scaling="auto", sweep__num_samples=30)
    assert found.possible
    assert found.sizes[0].cpus_per_worker == 64 // found.sizes[0].at_once > 1
    hopeless = planned(NodeMemory(2, 0, GIB // 4), sizes=None, scaling="auto")
    assert any("fits in no way" in text for text in texts(hopeless, "error"))


def test_gpus_of_another_cluster() -> None:
    node = NodeMemory(8, 4, 64 * GIB, 16 * GIB)
    found = planned(node, sizes=None, rate=None)
    size = found.sizes[0]
    assert (size.gpus_per_worker, size.precision, size.at_once) == (1, "bf16", 4)
    assert size.seconds_per_step is None
    assert found.wall_hours is None
    assert "--flops-per-second" in size.time_basis
    unknown = planned(NodeMemory(8, 4, 64 * GIB), sizes=None)
    assert any("--gpu-memory-gib" in text for text in texts(unknown, "warning"))


def test_sizes_that_take_turns() -> None:
    found = planned(NodeMemory(2, 0, 16 * GIB))
    assert any("1m and 8m have no room at the same time" in text for text in texts(found, "warning"))
    assert not planned(NodeMemory(4, 0, 16 * GIB)).problems


def test_a_scheduler_without_enough_trials_and_a_budget_without_enough_hours() -> None:
    asha = {"type": "asha", "grace_steps": 20, "reduction_factor": 4}
    assert any("no trial would be stopped early" in text for text in texts(planned(sweep__scheduler=asha), "warning"))
    short = planned(sweep__budget={"device_hours": 1e-6})
    assert any("below one trial" in text for text in texts(short, "error"))


def test_checkpoints_that_do_not_fit_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orpo_ray.planning.plan.shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
    assert any("1 MiB free" in text for text in texts(planned(), "error"))


def test_measured_time_is_taken_where_the_sweep_has_run(tmp_path: Path) -> None:
    journal = tmp_path / "test" / EVENTS_FILE
    journal.parent.mkdir()
    trial = {"trial_id": "a", "time": 0}
    start = {"attempt": 1, "group": "g", "step": 0, "max_steps": 100, "devices": 2}
    events = [
        {"event": "submitted", "bundle": "8m", "params": {"size": "8m", "loss.orpo_lambda": 0.1}, **trial},
        {"event": "started", **start, **trial},
        {"event": "eval", "step": 20, "metrics": {}, "checkpoint": None, "seconds": 50.0, **trial},
    ]
    journal.write_text("".join(json.dumps(event) + "\n" for event in events))
    small, large = planned(output_dir=str(tmp_path)).sizes
    assert small.time_basis != large.time_basis == "measured"
    assert large.seconds_per_step == pytest.approx(2.5)


@pytest.mark.parametrize("name", ["quickstart", "hh_smollm2"])
def test_reads_well_at_100_columns(name: str, tmp_path: Path) -> None:
    from orpo_ray.config import load

    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    overrides = ["model.path=tiny-llama-8m", "data.path=builtin://style-pairs"] if name == "hh_smollm2" else []
    overrides.append(f"output_dir={tmp_path}")  # in runs/ the sweep may have run, and its time be known
    console.print(plan_table(plan(load(EXPERIMENTS / f"{name}.yaml", overrides), LAPTOP, 1e11)))
    text = console.export_text()
    assert "…" not in text
    for word in ("wall time", "± a factor of 2", "checkpoints", "GiB each", "device-h"):
        assert word in text


def test_ten_thousand_trials_are_planned_in_seconds() -> None:
    arguments = ["plan", str(EXPERIMENTS / "quickstart.yaml"), "sweep.num_samples=1250", "--json", "--num-gpus", "0"]
    code = (
        "import sys; from orpo_ray.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'ray', 'transformers', 'mlflow'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(run.stdout) if run.stdout.startswith("{") else run.stderr
    assert found["trials"] == 10_000, run.stderr
    # CPU time: others may use the machine too.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5.0


def test_a_step_in_bf16_is_faster_on_a_cpu_with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "cpu_rate", lambda shape: 1e11)
    without, with_units = (
        planned(NodeMemory(2, 0, 16 * GIB, bf16_units=units), sizes=None, rate=None).sizes[0] for units in (False, True)
    )
    assert (without.precision, with_units.precision) == ("fp32", "bf16")
    assert with_units.seconds_per_step == pytest.approx(without.seconds_per_step / speed.CPU_BF16_GAIN)
    assert "for bf16" not in without.time_basis
    assert with_units.time_basis.endswith("times 1.5 for bf16")


def test_bf16_units_are_those_that_a_worker_finds_with_torch() -> None:
    assert this_machine().bf16_units == has_bf16_units()


@pytest.mark.parametrize(("flag", "expected"), [("amx_bf16", True), ("avx512_bf16", True), ("avx512_f", False)])
def test_which_cpus_have_bf16_units(flag: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {flag: True})
    assert has_bf16_units() is expected
