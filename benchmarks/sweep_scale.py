"""Does a sweep of many trials stay flat? 1,000 trials of next to nothing through the real engine, watched from outside.

    python -m benchmarks.sweep_scale                   # 1,000 trials, two groups, some minutes

Each trial trains an adapter of a 1M model for one step and evaluates it once: what is left is the engine's own cost.
The script samples memory and CPU time of the processes on the head (the sweep with Tune and the writer to MLflow, the
broker, the trial drivers) and takes time per trial from the journal, in tenths of the sweep. Writes
benchmarks/results/sweep-scale-cpu.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import RESULTS, ROOT, described, save

PARTS = 10
_EVERY_S = 2.0


def experiment(folder: Path, trials: int) -> Path:
    """So many learning rates drawn at random."""
    tree = {
        "name": "scale",
        "output_dir": str(folder / "runs"),
        "model": {"path": "tiny-llama-1m", "lora": {"rank": 1}},
        "data": {
            "path": "builtin://style-pairs",
            "train_pairs": 16,
            "eval_pairs": 1,
            "max_tokens": 256,
            "max_prompt_tokens": 160,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"global_batch_size": 1, "max_steps": 1, "log_every": 1, "eval_every": 1},
        "sweep": {
            "metric": "eval/nll",
            "num_samples": trials,
            "max_group_trials": 10**6,
            "space": {"optim.lr": {"type": "loguniform", "low": 1.0e-5, "high": 1.0e-2}},
        },
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def kind_of(process: psutil.Process, sweep_pid: int) -> str | None:
    """Which of the head's processes it is."""
    if process.pid == sweep_pid:
        return "sweep"
    title = " ".join(process.cmdline())
    kinds = {"Broker": "broker", "TrialDriver": "drivers", "RayTrainWorker": "workers", "gcs_server": "gcs"}
    return next((kind for word, kind in kinds.items() if word in title), None)


def watch(process: subprocess.Popen[bytes], journal: Path) -> list[dict[str, Any]]:
    """Memory (GiB) and CPU seconds by kind of process, with how many trials had ended, until the sweep ends."""
    samples: list[dict[str, Any]] = []
    root = psutil.Process(process.pid)
    while process.poll() is None:
        sample: dict[str, Any] = {"time": time.time(), "ended": _count(journal)}
        for member in [root, *root.children(recursive=True)]:
            try:
                kind = kind_of(member, process.pid)
                if kind is not None:
                    cpu = member.cpu_times()
                    used = sample.setdefault(kind, {"gib": 0.0, "cpu_s": 0.0, "processes": 0})
                    used["gib"] += member.memory_info().rss / 2**30
                    used["cpu_s"] += cpu.user + cpu.system
                    used["processes"] += 1
            except psutil.NoSuchProcess:
                continue
        samples.append(sample)
        time.sleep(_EVERY_S)
    return samples


def _count(journal: Path) -> int:
    return journal.read_bytes().count(b'"event": "finished"') if journal.exists() else 0


def summarise(samples: list[dict[str, Any]], events: list[dict[str, Any]], trials: int) -> dict[str, Any]:
    """Tenths of the sweep side by side, and unit costs."""
    ends = np.array([e["time"] / 1000 for e in events if e["event"] == "finished"])
    bounds = np.linspace(0, trials, PARTS + 1).astype(int)
    seconds = [float(ends[b - 1] - ends[max(a - 1, 0)]) / max(b - max(a, 1), 1) for a, b in itertools.pairwise(bounds)]
    parts = []
    for number, (a, b) in enumerate(itertools.pairwise(bounds)):
        inside = [s for s in samples if a <= s["ended"] < b] or samples[-1:]
        part: dict[str, Any] = {"trials": f"{a + 1}-{b}", "seconds_per_trial": seconds[number]}
        for kind in ("sweep", "broker", "drivers", "workers", "gcs"):
            found = [s[kind]["gib"] for s in inside if kind in s]
            part[f"{kind}_gib"] = median(found) if found else None
        parts.append(part)
    first, last = (next(s for s in order if s["ended"] and "broker" in s) for order in (samples, samples[::-1]))
    between = last["ended"] - first["ended"]
    cpu = {
        kind: (last[kind]["cpu_s"] - first[kind]["cpu_s"]) / between
        for kind in ("sweep", "broker", "drivers", "gcs")
        if kind in first and kind in last and between
    }
    journal_bytes = sum(len(json.dumps(e)) + 1 for e in events) / trials
    return {"parts": parts, "head_cpu_seconds_per_trial": cpu, "journal_bytes_per_trial": journal_bytes}


def main(words: list[str] | None = None) -> int:
    """Run, watch, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep_scale", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    words = sys.argv[1:] if words is None else words
    options = parser.parse_args(words)
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = experiment(folder, options.trials)
        command = [sys.executable, "-m", "orpo_ray.cli", "sweep", str(file), "--num-cpus", "2"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
        begun = time.time()
        with (folder / "log").open("wb") as sink, console.status(f"{options.trials} trials"):
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT)
            samples = watch(process, folder / "runs" / "scale" / "events.jsonl")
        if process.returncode:
            raise RuntimeError(f"the sweep ended with {process.returncode}: {(folder / 'log').read_text()[-2000:]}")
        wall = time.time() - begun
        lines = (folder / "runs" / "scale" / "events.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        results = json.loads((folder / "runs" / "scale" / "results.json").read_text())
        assert [t["status"] for t in results["trials"]] == ["finished"] * options.trials
        assert all(t["mlflow_run_id"] for t in results["trials"]), "MLflow lacks a trial"
    summary = summarise(samples, events, options.trials) | {"wall_seconds": wall, "trials": options.trials}
    table = Table("trials", "s per trial", "sweep GiB", "broker GiB", "drivers GiB", "workers GiB", title="in tenths")
    for part in summary["parts"]:
        kinds = ("sweep_gib", "broker_gib", "drivers_gib", "workers_gib")
        cells = ["" if part[k] is None else f"{part[k]:.2f}" for k in kinds]
        table.add_row(part["trials"], f"{part['seconds_per_trial']:.3f}", *cells)
    console.print(table, summary["head_cpu_seconds_per_trial"])
    command_text = ("python -m benchmarks.sweep_scale " + shlex.join(words)).strip()
    save("sweep-scale-cpu", f"{options.trials}-trials", {"made": described(command_text)} | summary, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
