"""One measured process: a few optimizer steps of one side, its time and memory as JSON.

    python -m benchmarks.steps --side trl --batch 8 --precision bf16 --out trl.json

The parents (`throughput`, `memory`, `scaling`) start it; by hand it serves to look at one case.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import case as cases

if TYPE_CHECKING:
    from benchmarks.probe import Probe


def main(words: list[str] | None = None) -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.splitlines()[0])
    cases.add_arguments(parser)
    parser.add_argument("--out", type=Path, help="JSON file; standard output by default")
    arguments = parser.parse_args(words)
    result = json.dumps(run(cases.from_arguments(arguments)), indent=1)
    if arguments.out:
        arguments.out.write_text(result + "\n", encoding="utf-8")
    else:
        print(result)


def run(case: cases.Case) -> dict[str, Any]:
    """Train `steps` + 1 optimizer steps of the case's side in this process."""
    prepare_process(case)
    from benchmarks import workload
    from benchmarks.probe import Probe
    from orpo_ray.models.loading import count_parameters_of

    probe = Probe(case.device)
    losses = _trainer(case.side)(case, probe)
    peaks = probe.peaks()  # before the pairs are read once more
    pairs = workload.load(case)
    batches = workload.global_batches(case, pairs)[1:]
    prompt, chosen, rejected = (
        sum(int(lengths_N[indices].sum()) for indices in batches)
        for lengths_N in (pairs.prompt_lengths_N, pairs.chosen_lengths_N, pairs.rejected_lengths_N)
    )
    return {
        "case": case.as_json(),
        "warmup_seconds": probe.seconds[0],
        "seconds": probe.seconds[1:],
        "pairs_per_second": case.batch * case.steps / sum(probe.seconds[1:]),
        "tokens": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        "losses": losses,
        "parameters": count_parameters_of(workload.model_config(case)),
        "resident_gib": probe.resident_gib,
        **peaks,
    }


def prepare_process(case: cases.Case) -> None:
    """Threads and device, before DeepSpeed is imported and looks for a device itself."""
    os.environ["OMP_NUM_THREADS"] = str(case.threads)
    os.environ["DS_ACCELERATOR"] = case.device
    if case.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(case.threads)


def _trainer(side: cases.Side) -> Callable[[cases.Case, Probe], list[float]]:
    # Each side's libraries are imported in its own processes only: they cost memory.
    match side:
        case "ours":
            from benchmarks import ours_side

            return ours_side.run
        case "trl":
            from benchmarks import trl_side

            return trl_side.run
        case "liger" | "llamafactory":
            from benchmarks import plain_side

            return plain_side.run


if __name__ == "__main__":
    main()
