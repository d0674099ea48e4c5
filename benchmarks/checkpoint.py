"""What a checkpoint costs a training loop: DeepSpeed's plain save against ours, which hashes, stores and commits.

    python -m benchmarks.checkpoint                    # 135M random weights, 2 ranks, ZeRO 2 and 3

In one process per rank, in turn, after an optimizer step each: `engine.save_checkpoint`; ours into a folder; ours into
an object store (moto's S3 server on loopback). Blocked is the time until the next step may begin. What goes on in
the background competes with those steps for the machine, so the cost is also measured as a whole: the steps from one
save until it is committed, against as many undisturbed ones. Writes benchmarks/results/checkpoint-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import workload
from benchmarks.case import LR, Case
from benchmarks.rounds import RESULTS, ROOT, described, save, spread

PLAIN, FOLDER, STORE = "DeepSpeed's plain save", "ours, to a folder", "ours, to an object store"
_MODEL, _TINY = "random:49152:576:30", "random:16384:64:2"
_DATA = "tokens:96:32:32"
_BUCKET = "checkpoints"
_UNDISTURBED_STEPS = 5
_MOST_STEPS, _STEPS_OF_DATA = 100_000, 50
"""More steps than are ever taken; pairs for so many, which come again and again."""


@dataclass
class Measured:
    """One way to save, one number a round."""

    blocked_s: list[float] = field(default_factory=list)
    """From the call to the next step, until the slowest rank is through."""
    committed_s: list[float] = field(default_factory=list)
    """From the call until it is a checkpoint that survives any crash of the process."""
    cost_s: list[float] = field(default_factory=list)
    """What the steps until then took longer than undisturbed ones, the blocked time included."""
    bytes: int = 0


def main(words: list[str] | None = None) -> int:
    """Measure every stage in processes of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], metavar="ZERO_STAGE")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--rank-of-stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    words = sys.argv[1:] if words is None else words
    options = parser.parse_args(words)
    if options.rank_of_stage is not None:
        _measure(options.rank_of_stage, _case(options.quick), options.rounds, options.into)
        return 0
    workload.model_config(_case(options.quick))  # here: in a process group transformers saves on rank 0 alone
    made = described(shlex.join(["python", "-m", "benchmarks.checkpoint", *words]))
    shown = Table(title=f"seconds of a checkpoint, {options.workers} ranks")
    for column in ("ZeRO", "", "blocked", "whole cost", "committed after", "MiB"):
        shown.add_column(column)
    for stage in options.stages:
        rows = _run_ranks(stage, options)
        save("checkpoint-cpu", f"zero-{stage}", {"made": made, "workers": options.workers, **rows}, options.results)
        for name, row in rows["ways"].items():
            numbers = (f"{row[key]['median']:.2f}" for key in ("blocked_s", "cost_s", "committed_s"))
            shown.add_row(str(stage), name, *numbers, f"{row['bytes'] / 2**20:.0f}")
    Console().print(shown)
    return 0


def _case(quick: bool) -> Case:
    return Case(model=_TINY if quick else _MODEL, data=_DATA, precision="fp32", batch=4, steps=_MOST_STEPS)


def _run_ranks(stage: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch, _object_store() as environment:
        into = Path(scratch)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.workers}"]
        command += ["-m", "benchmarks.checkpoint", f"--rank-of-stage={stage}", f"--into={into}"]
        command += ["--rounds=1", "--quick"] if options.quick else [f"--rounds={options.rounds}"]
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | environment | {"PATH": path})
        return dict(json.loads((into / "measured.json").read_text(encoding="utf-8")))


def _measure(stage: int, case: Case, rounds: int, into: Path) -> None:
    """One rank's part."""
    import torch
    import torch.distributed as dist

    from benchmarks.ours_side import experiment
    from orpo_ray.config import CheckpointConfig
    from orpo_ray.storage.object_store import Storage
    from orpo_ray.training.checkpoint import Checkpoints
    from orpo_ray.training.engine import destroy, init_process_group
    from orpo_ray.training.metrics import PairSums
    from orpo_ray.training.steps import TrialRun

    init_process_group()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    tree = experiment(case)
    config = tree.model_copy(
        update={
            "deepspeed": tree.deepspeed.model_copy(update={"zero_stage": stage}),
            "scaling": tree.scaling.model_copy(update={"num_workers": dist.get_world_size()}),
        }
    )
    run = replace(TrialRun.build(config), train_pairs=workload.load(replace(case, steps=_STEPS_OF_DATA)))
    sums = PairSums.zeros(run.engine.device)
    batches = iter(run.batches(1, _MOST_STEPS))
    keep = CheckpointConfig(keep_last=1)
    remote = Storage(f"s3://{_BUCKET}/zero-{stage}")
    ours = {
        FOLDER: Checkpoints(into / "ours", keep),
        STORE: Checkpoints(into / "stored", keep, remote=remote),
    }
    at = 0

    def step() -> float:
        nonlocal at
        began = time.perf_counter()
        at, batch = next(batches)
        run.step(batch, LR, sums, at)
        dist.barrier()
        return time.perf_counter() - began

    def plain() -> None:
        run.engine.save_checkpoint(str(into / "plain"), tag=f"step-{at}", save_latest=False)

    def is_committed(checkpoints: Checkpoints) -> bool:
        flags: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(flags, checkpoints.committed_step == saved_at)
        return all(flags)

    step()  # makes the moments, compiles what is compiled
    undisturbed: list[float] = []
    saved_at = 0
    ways = {name: Measured() for name in (PLAIN, FOLDER, STORE)}
    for _ in range(rounds):
        for name, measured in ways.items():
            usual = median(step() for _ in range(_UNDISTURBED_STEPS))
            undisturbed.append(usual)
            saved_at = at
            dist.barrier()
            began = time.perf_counter()
            if name == PLAIN:
                plain()
            else:
                assert ours[name].save(run.engine, at, {})
            dist.barrier()
            measured.blocked_s.append(time.perf_counter() - began)
            steps = 0
            while name != PLAIN and not is_committed(ours[name]):
                assert steps < 1000, "the checkpoint was not made"
                step()
                steps += 1
            if name != PLAIN:
                ours[name].wait()
            measured.committed_s.append(time.perf_counter() - began)
            measured.cost_s.append(time.perf_counter() - began - steps * usual)
            if name == PLAIN:
                measured.bytes = _size(into / "plain")
                dist.barrier()
                if dist.get_rank() == 0:
                    shutil.rmtree(into / "plain")
            else:
                measured.bytes = _size(into / ("ours" if name == FOLDER else "stored"))
            dist.barrier()
    for checkpoints in ours.values():
        checkpoints.close()
    if dist.get_rank() == 0:
        content = {
            "parameters": run.facts["model/parameters"],
            "step_s": median(undisturbed),
            "ways": {
                name: {key: spread(getattr(m, key)) for key in ("blocked_s", "committed_s", "cost_s")}
                | {"bytes": m.bytes}
                for name, m in ways.items()
            },
        }
        (into / "measured.json").write_text(json.dumps(content), encoding="utf-8")
    destroy(run.engine)
    dist.destroy_process_group()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextmanager
def _object_store() -> Iterator[dict[str, str]]:
    """moto's S3 server with one bucket; gives the environment that leads to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        _wait_for(lambda: urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{_BUCKET}", method="PUT")).close())
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_REGION": "us-east-1",
        }
    finally:
        server.kill()
        server.wait()


def _wait_for(act: Callable[[], None], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return act()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
