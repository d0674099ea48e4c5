"""Which AdamW updates fastest on a CPU: torch's fused one, torch's plain one, or DeepSpeed's CPUAdam?

    python -m benchmarks.optimizer                     # 135M parameters, as SmolLM2's

The three update the same parameters with the same gradients, in turn; their results are compared. Writes
benchmarks/results/optimizer-cpu.json.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import RESULTS, described, save

LAYER = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,))
"""Parameters of one of SmolLM2-135M's layers."""
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def parameters(layers: int, vocabulary: int) -> list[torch.nn.Parameter]:
    """Seeded values and gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(vocabulary, 576), *LAYER * layers, (576,)]
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def main(words: list[str] | None = None) -> int:
    """Measure; 1 if the optimizers disagree."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="one small layer, one round")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    words = sys.argv[1:] if words is None else words
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    size, rounds = ((1, 64), 1) if options.quick else ((30, 49_152), options.rounds)
    held = {name: parameters(*size) for name in ("torch fused AdamW", "torch AdamW", "DeepSpeedCPUAdam")}
    optimizers = {
        "torch fused AdamW": torch.optim.AdamW(held["torch fused AdamW"], fused=True, **SETTINGS),
        "torch AdamW": torch.optim.AdamW(held["torch AdamW"], fused=False, **SETTINGS),
        "DeepSpeedCPUAdam": DeepSpeedCPUAdam(held["DeepSpeedCPUAdam"], adamw_mode=True, **SETTINGS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for number in range(rounds + 1):
        for name, optimizer in optimizers.items():
            began = time.perf_counter()
            optimizer.step()
            if number:  # the first makes the moments
                seconds[name].append(time.perf_counter() - began)
    reference = held["torch fused AdamW"]
    rows = [
        {
            "optimizer": name,
            "seconds": seconds[name],
            "median_seconds": median(seconds[name]),
            "largest_difference": max(
                float((a - b).detach().abs().max()) for a, b in zip(held[name], reference, strict=True)
            ),
        }
        for name in optimizers
    ]
    count = sum(parameter.numel() for parameter in reference)
    made = described(shlex.join(["python", "-m", "benchmarks.optimizer", *words]))
    save("optimizer-cpu", "adamw", {"made": made, "parameters": count, "rows": rows}, options.results)
    shown = Table(title=f"one update of {count / 1e6:.0f}M fp32 parameters, {options.threads} threads")
    for column in ("optimizer", "median s", "largest difference"):
        shown.add_column(column)
    for row in rows:
        shown.add_row(row["optimizer"], f"{row['median_seconds']:.3f}", f"{row['largest_difference']:.1e}")
    Console().print(shown)
    return 0 if all(row["largest_difference"] < 1e-4 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
