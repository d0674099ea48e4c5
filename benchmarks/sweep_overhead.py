"""What a sweep costs beyond training: the stock Tuner-over-TorchTrainer pattern against warm worker groups.

    python -m benchmarks.sweep_overhead                # 16 trials of about 10 s, two at a time, in turn

Both sides run the same trials with the same loop, each side in a process of its own; training time is what the loop's
clock says that steps took. The overhead of a trial is the time two workers were there and did not train, from the start
of the sweep (Ray is up) to its end, over the trials. Writes benchmarks/results/sweep-overhead-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import RESULTS, ROOT, described, save, spread

SLOTS = 2
BATCH = 8


def experiment(folder: Path, trials: int, steps: int) -> Path:
    """The sweep that both sides run: so many learning rates of one tiny model."""
    tree = {
        "name": "overhead",
        "output_dir": str(folder / "runs"),
        "model": {"path": "tiny-llama-1m"},
        "data": {
            "path": "builtin://style-pairs",
            "train_pairs": 512,
            "eval_pairs": 16,
            "max_tokens": 256,
            "max_prompt_tokens": 160,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"global_batch_size": BATCH, "max_steps": steps, "log_every": 5, "eval_every": max(steps // 4, 1)},
        "sweep": {
            "metric": "eval/nll",
            "space": {"optim.lr": {"type": "grid", "values": [1e-4 * 1.2**i for i in range(trials)]}},
        },
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def run_side(side: str, trials: int, steps: int) -> dict[str, Any]:
    """One sweep. Returns wall seconds, training seconds of each trial, and what follows from them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = experiment(folder, trials, steps)
        out = folder / "out.json"
        commands = {
            "ours": [sys.executable, "-m", "orpo_ray.cli", "sweep", str(file), "--num-cpus", str(SLOTS)],
            "stock": [sys.executable, "-m", "benchmarks.stock_side", str(file), "--out", str(out)],
        }
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
        begun = time.time()
        with (folder / "log").open("wb") as sink:
            status = subprocess.call(commands[side], cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        process_seconds = time.time() - begun
        if status:
            raise RuntimeError(f"{side} ended with status {status}: {(folder / 'log').read_text()[-2000:]}")
        run_dir = folder / "runs" / "overhead"
        measured = _ours(run_dir) if side == "ours" else _stock(out)
    training = measured.pop("training_seconds")
    busy = measured["wall_seconds"] * SLOTS
    return {
        "side": side,
        **measured,
        "process_seconds": process_seconds,
        "training_seconds": sum(training),
        "overhead_seconds_per_trial": (busy - sum(training)) / len(training),
        "useful_share": sum(training) / busy,
        "trials": len(training),
    }


def _training_seconds(logs: list[dict[str, float]], every: int) -> float:
    return sum(every * BATCH / metrics["perf/pairs_per_second"] for metrics in logs)


def _ours(run_dir: Path) -> dict[str, Any]:
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    sweep = json.loads((run_dir / "sweep.json").read_text())
    logs: dict[str, list[dict[str, float]]] = {}
    for event in events:
        if event["event"] == "log":
            logs.setdefault(event["trial_id"], []).append(event["metrics"])
    ends = [event for event in events if event["event"] == "finished"]
    assert all(event["status"] == "finished" for event in ends)
    first = min(event["time"] for event in events if event["event"] == "started")
    training = [_training_seconds(of_trial, every=5) for of_trial in logs.values()]
    last = ends[-1]["time"]
    return {
        "wall_seconds": (last - sweep["created"]) / 1000,
        # Without the start of the groups, which a longer sweep pays once as well.
        "useful_share_once_started": sum(training) / ((last - first) / 1000 * SLOTS),
        "training_seconds": training,
    }


def _stock(out: Path) -> dict[str, Any]:
    result = json.loads(out.read_text())
    assert not result["errors"]
    training = [_training_seconds([m for _, m in trial["logs"]], every=5) for trial in result["trials"]]
    return {"wall_seconds": result["wall_seconds"], "training_seconds": training}


def main(words: list[str] | None = None) -> int:
    """Measure in turn, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60, help="of a trial; a multiple of 20")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    words = sys.argv[1:] if words is None else words
    options = parser.parse_args(words)
    console = Console()
    results: list[dict[str, Any]] = []
    for number in range(options.rounds):
        for side in ("ours", "stock") if number % 2 == 0 else ("stock", "ours"):
            with console.status(f"{side}, round {number + 1} of {options.rounds}"):
                results.append(run_side(side, options.trials, options.steps) | {"round": number + 1})
            console.print(results[-1])
    summary = {
        side: {
            name: spread([r[name] for r in results if r["side"] == side])
            for name in ("wall_seconds", "training_seconds", "overhead_seconds_per_trial", "useful_share")
        }
        for side in ("ours", "stock")
    }
    summary["ours"]["useful_share_once_started"] = spread(
        [r["useful_share_once_started"] for r in results if r["side"] == "ours"]
    )
    ours, stock = (summary[side]["overhead_seconds_per_trial"]["median"] for side in ("ours", "stock"))
    table = Table("", "wall s", "training s", "overhead s per trial", "useful share", title="sweep overhead")
    for side, values in summary.items():
        table.add_row(side, *(f"{values[n]['median']:.2f}" for n in list(values)[:4]))
    console.print(table, f"overhead_ratio {ours / stock:.3f}")
    command = "python -m benchmarks.sweep_overhead " + shlex.join(words)
    content = {"slots": SLOTS, "overhead_ratio": ours / stock, "summary": summary, "results": results}
    save(
        "sweep-overhead-cpu",
        f"{options.trials}-trials",
        {"made": described(command.strip())} | content,
        options.results,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
