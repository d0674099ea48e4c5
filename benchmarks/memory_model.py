"""Predicted against measured peak memory of workers: `planning.memory` beside real trials, each in fresh processes.

    python -m benchmarks.memory_model                 # all cases that this machine has models for, about 8 minutes
    python -m benchmarks.memory_model --only tiny     # cases whose name contains one of the words
    python -m benchmarks.memory_model --list

Writes benchmarks/results/memory-model-cpu.json; `python -m benchmarks.report` puts it into benchmarks/README.md.
Nothing is measured on CUDA yet: the model is the same there, with constants that were assumed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.rounds import RESULTS, ROOT, described, save
from benchmarks.workload import CACHE, WorkloadError, hh_path
from orpo_ray.config import experiment as configs
from orpo_ray.config import parse
from orpo_ray.formatting import GIB
from orpo_ray.hardware import device_of, this_machine
from orpo_ray.planning.architecture import architecture_of
from orpo_ray.planning.memory import peak_memory, tokens_per_pass

TARGET = 0.15
"""Largest relative error that is accepted."""
NAME = "memory-model-cpu"
_SMOLLM = CACHE / "smollm2-135m-instruct"
_TIMEOUT_S = 900
_LORA = {"model.lora": {"rank": 16}}
_TEXT = {"data.max_tokens": 512, "data.max_prompt_tokens": 384, "data.eval_pairs": 8, "train.max_steps": 2}


@dataclass(frozen=True, slots=True)
class MemoryCase:
    """One trial of two optimizer steps, with an evaluation and a checkpoint at its end."""

    name: str
    settings: dict[str, Any]
    """config path -> value."""

    @property
    def model(self) -> str:
        """Hub name, folder or preset."""
        return str(self.settings["model.path"])

    @property
    def group(self) -> str:
        """Section of the results: cases that are run again together."""
        return "tiny models" if self.model.startswith("tiny-") else "SmolLM2 135M"

    def experiment(self, cache_dir: Path | None = None) -> configs.ExperimentConfig:
        """What is trained; the pairs are HH-RLHF's."""
        tree = {"name": "memory-model", "model": {}, "data": {"path": str(hh_path())}, "train": {}}
        if cache_dir is not None:
            tree["data"]["cache_dir"] = str(cache_dir)
        return parse(tree, [f"{path}={json.dumps(value)}" for path, value in (_TEXT | self.settings).items()])


def cases() -> list[MemoryCase]:
    """Batches are such that passes are nearly as full as they may be, and but for the longest a step has several."""

    def tiny(size: str, tokens: int, workers: int = 1, **more: Any) -> MemoryCase:
        return case(f"tiny-llama-{size}", f"tiny {size}", tokens, {1024: 6, 4096: 25}[tokens], workers, **more)

    def smollm(tokens: int, workers: int = 1, **more: Any) -> MemoryCase:
        return case(str(_SMOLLM), "SmolLM2 135M", tokens, {1024: 8, 4096: 17}[tokens], workers, **more)

    def case(path: str, name: str, tokens: int, batch: int, workers: int, **more: Any) -> MemoryCase:
        settings = {
            "model.path": path,
            "train.max_tokens_per_micro_batch": tokens,
            "train.global_batch_size": batch * workers,
            "train.precision": more.get("precision", "fp32"),
            "scaling.num_workers": workers,
            "scaling.cpus_per_worker": max(1, 2 // workers),
            "deepspeed.zero_stage": more.get("zero", 0),
            "model.gradient_checkpointing": more.get("recompute", False),
        }
        words = [name, settings["train.precision"], f"{tokens} tokens"]
        words += ["LoRA"] if more.get("lora") else []
        words += ["recompute"] if more.get("recompute") else []
        words += [f"ZeRO-{more.get('zero', 0)} × {workers}"] if workers > 1 or more.get("zero") else []
        return MemoryCase(", ".join(words), settings | (_LORA if more.get("lora") else {}))

    return [
        tiny("1m", 1024),
        tiny("1m", 4096, precision="bf16"),
        tiny("4m", 4096),
        tiny("8m", 1024, lora=True),
        tiny("8m", 4096),
        tiny("8m", 4096, recompute=True),
        *(tiny("8m", 1024, workers, zero=zero) for zero in (0, 2, 3) for workers in (1, 2) if zero or workers > 1),
        smollm(1024),
        smollm(1024, precision="bf16"),
        smollm(1024, lora=True),
        smollm(1024, recompute=True),
        smollm(1024, lora=True, precision="bf16", recompute=True),
        smollm(1024, 2, zero=2),
        smollm(1024, 2, zero=3),
        smollm(4096),
        smollm(4096, recompute=True),
    ]


def main(words: list[str] | None = None) -> int:
    """Measure; 1 if a case failed or missed the target."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_model", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="names of the cases")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.rank:
        _run_rank(json.loads(options.rank.read_text(encoding="utf-8")))
        return 0
    chosen = [case for case in cases() if not options.only or any(word in case.name for word in options.only)]
    console = Console()
    if options.list:
        console.print("\n".join(case.name for case in chosen), highlight=False)
        return 0
    facts = described(shlex.join(["python", "-m", "benchmarks.memory_model", *words]))
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in chosen:
        if Path(case.model).is_absolute() and not Path(case.model).is_dir():
            console.print(f"left out: {case.name}: {case.model} is not there")
            continue
        rows = groups.setdefault(case.group, [])
        try:
            rows.append(compared(case))
        except WorkloadError as error:
            console.print(f"left out: {case.name}: {error}")
            continue
        console.print(" | ".join(cells(rows[-1])), highlight=False)
        save(NAME, case.group, {"made": facts, "target": TARGET, "rows": rows}, options.results)
    found = [row for rows in groups.values() for row in rows]
    console.print(table(found))
    return 0 if found and all(row["status"] == "ok" and abs(row["error"]) <= TARGET for row in found) else 1


def compared(case: MemoryCase) -> dict[str, Any]:
    """A case's prediction and its measurement, in bytes, and their relative difference."""
    config = case.experiment()
    device = device_of(False, [this_machine()])
    predicted = peak_memory(config, architecture_of(config.model), device, is_first_trial=True)
    row: dict[str, Any] = {
        "name": case.name,
        "settings": case.settings | {"model.path": Path(case.model).name},
        "limit_tokens": tokens_per_pass(config),
        "predicted": predicted.peak,
    }
    try:
        measured = measure(case)
    except RuntimeError as error:
        return row | {"status": "failed", "reason": str(error)}
    peak = max(rank["peak"] for rank in measured)
    tokens = max(rank["tokens"] for rank in measured)
    return row | {
        "status": "ok",
        "measured": peak,
        "tokens": tokens,
        "idle": measured[0]["idle"],
        "error": predicted.peak / peak - 1,
    }


def measure(case: MemoryCase, cache_dir: Path | None = None) -> list[dict[str, int]]:
    """Train in as many fresh processes as the case has workers.

    Returns:
        For each rank, in bytes, `peak`, its highest resident memory, and `idle`, that before the trial; and `tokens`,
        of its largest forward pass.

    Raises:
        RuntimeError: a process failed; with the end of its output.
    """
    case.experiment(cache_dir)  # complains here rather than there
    workers = int(case.settings["scaling.num_workers"])
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        processes, outs = [], []
        for rank in range(workers):
            job, out, log = (Path(folder) / f"{kind}-{rank}" for kind in ("job", "out", "log"))
            cache = None if cache_dir is None else str(cache_dir)
            job.write_text(
                json.dumps(
                    {"name": case.name, "settings": case.settings, "out": str(out), "cache": cache, "dir": folder}
                )
            )
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(workers),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": str(case.settings["scaling.cpus_per_worker"]),
                "TOKENIZERS_PARALLELISM": "false",
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            }
            command = [sys.executable, "-m", "benchmarks.memory_model", "--rank", str(job)]
            with log.open("wb") as sink:
                processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT)
                )
            outs.append((out, log))
        try:
            codes = [process.wait(_TIMEOUT_S) for process in processes]
        except subprocess.TimeoutExpired:
            codes = [-1]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise RuntimeError(f"exit statuses {codes}: {outs[0][1].read_text(errors='replace')[-1500:]}")
        return [json.loads(out.read_text(encoding="utf-8")) for out, _ in outs]


def _run_rank(job: dict[str, Any]) -> None:
    """One worker, with the modules that Ray's workers have loaded."""
    import psutil
    import torch

    import orpo_ray.orchestration.worker  # noqa: F401
    from benchmarks.probe import Probe
    from orpo_ray.training import evaluate, loop, steps, trial
    from orpo_ray.training.engine import init_process_group

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    init_process_group()
    idle = psutil.Process().memory_info().rss
    case = MemoryCase(job["name"], job["settings"])
    largest, forward = 0, steps.pair_logps

    def watched(model: Any, batch: Any) -> Any:
        nonlocal largest
        largest = max(largest, batch.input_ids_RT.numel())
        return forward(model, batch)

    steps.pair_logps = evaluate.pair_logps = watched
    cache_dir = None if job["cache"] is None else Path(job["cache"])
    loop.train(case.experiment(cache_dir), trial.RankContext(Path(job["dir"]) / "trial"))
    peak = Probe("cpu").peaks()["peak_gib"]
    assert peak is not None
    Path(job["out"]).write_text(
        json.dumps({"peak": int(peak * GIB), "tokens": largest, "idle": idle}), encoding="utf-8"
    )
    torch.distributed.destroy_process_group()


HEADER = ("case", "tokens of the fullest pass", "predicted GiB", "measured GiB", "off by")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row as text."""
    predicted = f"{row['predicted'] / GIB:.2f}"
    if row["status"] != "ok":
        return row["name"], "", predicted, row["status"], ""
    return row["name"], f"{row['tokens']:,}", predicted, f"{row['measured'] / GIB:.2f}", f"{row['error']:+.0%}"


def table(rows: list[dict[str, Any]]) -> Table:
    """For the terminal."""
    shown = Table()
    for column in HEADER:
        shown.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        shown.add_row(*cells(row))
    return shown


if __name__ == "__main__":
    sys.exit(main())
